"""Mistakes that are told before a cache, a manifest or a model is opened."""

import subprocess
import sys
from pathlib import Path

import pytest

from shared.errors import InputError
from train.config import TrainConfig
from train.first_checks import check_first
from train.run_folder import RunDescription, open_run

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """Of a cache that is not there: nothing here opens it."""
    return TrainConfig.of(cache="/nowhere", output=tmp_path / "run")


def begin(config: TrainConfig) -> None:
    description = RunDescription(
        config=config.to_json(), model_config={}, provenance={}, buckets={}, samples_sha256="of the samples"
    )
    open_run(config.output, description)


def test_all_options_that_differ_from_those_of_the_run_are_named_with_both_values(config):
    begin(config)
    check_first(config.changed(steps=9, num_workers=0))
    with pytest.raises(InputError, match=r"the run there has .* \(cache /nowhere\), this one has ") as caught:
        check_first(config.changed(cache="/elsewhere", weight_decay=0.1, batch_size=4, seed=3))
    for name in ("seed=0", "seed=3", "weight_decay=0.0", "weight_decay=0.1", "batch_size=8", "batch_size=4"):
        assert str(caught.value).count(name) == 1, name


def test_more_steps_do_not_move_the_end_of_a_falling_learning_rate_by_the_way(config):
    falling = config.changed(lr_schedule="cosine", steps=1000)
    begin(falling)
    longer = falling.changed(steps=2000)
    with pytest.raises(InputError, match="falls until step 1000, and steps=2000 .*: give --decay-steps 1000 to keep"):
        check_first(longer)
    for told in ({"decay_steps": 1000}, {"decay_steps": 2000}, {"lr_schedule": "linear"}, {"lr_schedule": "constant"}):
        check_first(longer.changed(**told))


def test_a_dry_run_may_have_other_options_than_the_run_of_its_folder(config):
    begin(config)
    check_first(config.changed(seed=3, dry_run=True))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "p.txt: cannot be read (No such file or directory): expected a text file of prompts, one a line"),
        (b"# none\n", "p.txt: found no prompt: expected one a line"),
        (b"\xff\xfe\x00", "p.txt: expected a UTF-8 text file of prompts"),
    ],
)
def test_prompts_that_cannot_be_read_are_told_first(config, tmp_path, content, complaint):
    file = tmp_path / "p.txt"
    if content is not None:
        file.write_bytes(content)
    for dry_run in (False, True):
        with pytest.raises(InputError) as caught:
            check_first(config.changed(preview_every=5, preview_prompts=file, dry_run=dry_run))
        assert complaint in str(caught.value)


def test_weights_that_are_not_there_are_told_first_and_a_repository_is_not_asked(config, tmp_path):
    with pytest.raises(InputError, match="w.pth: no such file or folder"):
        check_first(config.changed(init_from=str(tmp_path / "w.pth")))
    with pytest.raises(InputError, match="found no model.safetensors with config.json"):
        check_first(config.changed(init_from=str(tmp_path)))
    check_first(config.changed(init_from="owner/name/w.pth"))


def test_encoders_that_are_not_there_are_told_before_clips_are_probed(config, tmp_path):
    online = {"cache": None, "online": "clips.csv", "buckets": ("4x32x32",), "vae": "demo:vae"}
    with pytest.raises(InputError, match="--text-encoder: model '/no/t5': no such folder"):
        check_first(config.changed(**online, text_encoder="/no/t5"))
    with pytest.raises(InputError, match="--text-encoder .*: found no config.json in this folder"):
        check_first(config.changed(**online, text_encoder=str(tmp_path)))
    check_first(config.changed(**online, text_encoder="demo:t5"))


def test_a_mistake_is_told_without_loading_what_trains(config, tmp_path):
    code = (
        "import sys, train.__main__\n"
        f"sys.argv = ['train', '--cache', '/nowhere', '--output', {str(config.output)!r}, '--preview-every', '1',"
        f" '--preview-prompts', {str(tmp_path / 'p.txt')!r}]\n"
        "code = train.__main__.main()\n"
        "print(code, sorted({'deepspeed', 'transformers', 'diffusers', 'ray'} & sys.modules.keys()))"
    )
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert told.stdout == "2 []\n", told.stderr
    assert told.stderr.count("\n") == 1
    assert "p.txt: cannot be read (No such file or directory)" in told.stderr


def test_a_run_from_a_cache_loads_no_encoder():
    code = "import sys, train.trainer; sys.exit(bool({'transformers', 'diffusers'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
