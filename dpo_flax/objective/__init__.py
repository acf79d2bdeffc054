"""Preference objectives as pure functions of log-probs; they know no model."""
