"""Executable attacks: each builds a hostile, or legal but odd, checkpoint and says what must become of it."""
