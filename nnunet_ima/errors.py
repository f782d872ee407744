"""The one exception that a user is meant to read."""


class UserError(Exception):
    """Something in the user's input is wrong.

    The message is one sentence that says what is wrong, where, and what to do. The command line prints it and exits
    with status 2; trainers turn it into a clean exit of ``nnUNetv2_train``.
    """


def is_out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch, cuDNN, cuBLAS or MPS had too little memory; not all of them have an exception for it."""
    said = ("out of memory", "ALLOC_FAILED", "can't allocate memory", "not enough memory")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in said)
