"""Make tables, plots and web pages from records alone. Imports no torch."""
