"""Everything ScMoE cannot do, refused at start-up in one line: :func:`~.rules.validate`."""
