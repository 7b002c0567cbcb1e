"""What a person can cause, said in one message: the command line prints it and leaves with `exit_code`."""


class UserError(ValueError):
    """Something outside the program is not as it must be: a path, a file, a data set, a model. Exit code 1."""

    exit_code = 1


class UsageError(UserError):
    """The call itself is wrong: an unknown mixer, a flag's value out of range. Exit code 2."""

    exit_code = 2


def one_line(error: BaseException, most: int | None = None) -> str:
    """What an error of some library says, on one line, cut after `most` letters."""
    return " ".join(str(error).split())[:most]


def causes(error: BaseException) -> list[BaseException]:
    """`error` and what it came from, the first cause last."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    return chain
