"""The one exception that a user is meant to read."""


class UserError(Exception):
    """Something in the user's input is wrong.

    The message is one sentence that says what is wrong, where, and what to do. The command line prints it and exits
    with status 2; trainers turn it into a clean exit of ``nnUNetv2_train``.
    """
