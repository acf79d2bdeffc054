"""How a trained policy leaves: as directories that other programs load, checked, with a card."""
