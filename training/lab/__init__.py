"""The laboratory: several sites on one machine, joined by an emulated wide-area network."""
