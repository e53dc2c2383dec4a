"""One trial on several devices: its ranks as processes or Ray actors, and what they do together."""
