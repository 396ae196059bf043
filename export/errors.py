"""What an exporter or compiler cannot do with a sound request."""


class CompilerError(RuntimeError):
    """A compiler refused a graph, or built another plan than the one asked for; the message says what differs."""
