"""The command line inside the process of a test."""

import pytest

from tokenlab.cli import main


@pytest.fixture
def tokenlab(corpus_folder, monkeypatch, capsys):
    """Runs one command in this process; gives what it printed, and checks how it exits."""
    monkeypatch.chdir(corpus_folder)

    def run(*arguments, code=0):
        with pytest.raises(SystemExit) as exit:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert exit.value.code == code, err
        return out, err

    return run
