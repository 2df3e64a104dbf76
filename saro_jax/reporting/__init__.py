"""What a report is made of: the runs' folders, tables, charts, transcripts and the page."""
