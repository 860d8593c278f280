"""Who may ask for what: hosts, logins, turns, limits, and what nobody is told."""
