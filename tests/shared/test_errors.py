"""What a user sees of an error."""

import pytest

from shared.errors import run_entry_point


def test_a_ctrl_c_is_one_word_and_exit_code_130_and_a_traceback_only_with_debug(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def main() -> int:
        raise KeyboardInterrupt

    assert run_entry_point(main, debug=False) == 130
    assert capsys.readouterr().err == "interrupted\n"
    with pytest.raises(KeyboardInterrupt):
        run_entry_point(main, debug=True)
