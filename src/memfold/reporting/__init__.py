"""Reading run folders, and showing how they compare: tables, plots and one page of HTML."""
