"""`noria prefs`: the preferences of a home, counted, listed, carried elsewhere, forgotten."""
