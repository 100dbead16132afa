"""What several test files use."""

import functools
import inspect

import pytest

import common

common._random_weights = functools.cache(common._random_weights)  # made once for all tests


@pytest.fixture(autouse=True)
def working_folder(tmp_path, monkeypatch):
    """Every test works in an empty folder of its own."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def fails(capsys):
    """A function that runs `main(arguments)`, which is to end with status 2 and one line of error: its result."""

    def fails(main, *arguments):
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in arguments])
        assert exit_.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
        return lines[-1]

    return fails


@pytest.fixture
def spy(monkeypatch):
    """A function that notes all calls of `owner.name` from now on: the arguments of each by their names."""

    def spy(owner, name):
        calls, function = [], getattr(owner, name)

        def called(*arguments, **options):
            bound = inspect.signature(function).bind(*arguments, **options)
            bound.apply_defaults()
            calls.append(bound.arguments)
            return function(*arguments, **options)

        monkeypatch.setattr(owner, name, called)
        return calls

    return spy
