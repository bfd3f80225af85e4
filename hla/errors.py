"""What hla raises and warns beyond Python's own ValueError and TypeError."""


class Unsupported(NotImplementedError):
    """A named backend or form cannot do this request; the message holds each reason."""


class SlowPathWarning(UserWarning):
    """``backend=None`` ran the generic array code on an accelerator; said once per reason."""
