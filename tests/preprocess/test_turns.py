"""Threads that share a GPU take turns."""

import threading

import pytest

from preprocess.turns import Turns


def test_turns_are_taken_in_the_order_of_their_tickets() -> None:
    turns, order = Turns(), []
    tickets = [turns.next() for _ in range(8)]

    def work(number: int) -> None:
        with tickets[number]:
            order.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in reversed(range(8))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert order == list(range(8))


def test_a_turn_that_fails_or_is_given_up_does_not_hold_the_others() -> None:
    turns = Turns()
    first, second, third = (turns.next() for _ in range(3))
    with pytest.raises(ValueError, match="broken"), first:
        raise ValueError("broken")
    second.give_up()
    second.give_up()
    with third:
        pass
    assert not turns.waiting
