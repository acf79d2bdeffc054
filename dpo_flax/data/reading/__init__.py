"""Files -> raw records -> typed preferences, with errors that name the place."""
