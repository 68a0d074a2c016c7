"""Tables, plots and pages from records alone. Imports no torch."""
