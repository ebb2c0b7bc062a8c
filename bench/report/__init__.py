"""What a run says: tables, files, plots, comparisons."""
