"""Pure functions from a run record to HTML. Everything a model or a visitor wrote is escaped here."""
