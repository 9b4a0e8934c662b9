"""Which nodes are kept from work, and which are not."""

from preprocess.node_health import MOST_DEATHS, NodeHealth


def die(nodes: NodeHealth, node: str, *shards: str, others: bool = True, now: float = 0.0) -> bool:
    """Lets a worker of a node die with shards in hand."""
    return nodes.died(node, "SIGSEGV", shards=shards, others=others, now=now)


def test_a_node_whose_workers_die_of_different_shards_while_others_get_on_is_excluded() -> None:
    nodes = NodeHealth()
    assert not die(nodes, "bad", "a")
    nodes.came_through("good")
    assert not die(nodes, "bad", "b")
    assert die(nodes, "bad", "c")
    assert "3 workers in a row died there, the last: SIGSEGV" in nodes.excluded["bad"]
    assert nodes.avoided(1e9) == {"bad"}


def test_a_clip_that_kills_workers_excludes_no_node() -> None:
    nodes = NodeHealth()
    nodes.came_through("good")
    for number in range(10):
        assert not die(nodes, "innocent", "guilty", f"neighbour {number}")
        nodes.came_through("good")
    assert not nodes.excluded


def test_where_nothing_comes_through_no_node_is_to_blame() -> None:
    nodes = NodeHealth()
    for number in range(10):
        for node in "one", "two":
            assert not die(nodes, node, f"{node} {number}")
    assert not nodes.excluded


def test_the_only_node_is_neither_excluded_nor_does_it_rest() -> None:
    nodes = NodeHealth()
    nodes.came_through("gone")
    for number in range(10):
        assert not die(nodes, "last", f"{number}", others=False)
    assert not nodes.avoided(0.0)


def test_a_shard_that_comes_through_clears_a_node() -> None:
    nodes = NodeHealth()
    for number in range(10):
        nodes.came_through("good")
        assert not die(nodes, "weak", f"{number}")
        if number % 2:
            nodes.came_through("weak")
            assert nodes.num_deaths("weak") == 0


def test_workers_that_die_while_they_load_need_no_proof_by_others() -> None:
    nodes = NodeHealth()
    deaths = [nodes.died("bad", "no CUDA", shards=None, others=True, now=0.0) for _ in range(MOST_DEATHS)]
    assert deaths == [False, False, True]


def test_a_node_rests_longer_with_each_death() -> None:
    nodes = NodeHealth()
    die(nodes, "bad", "a", now=0.0)
    assert not nodes.avoided(0.0)
    die(nodes, "bad", "b", now=0.0)
    assert (nodes.avoided(9.0), nodes.avoided(11.0)) == ({"bad"}, frozenset())
    die(nodes, "bad", "c", now=100.0)
    assert (nodes.avoided(119.0), nodes.avoided(121.0)) == ({"bad"}, frozenset())
