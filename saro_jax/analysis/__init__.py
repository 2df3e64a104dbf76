"""Pure functions of the analyses, and the typed contents of an analysis folder."""
