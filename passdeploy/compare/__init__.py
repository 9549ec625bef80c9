"""Several methods through the same pipeline, budgets and seeds: rows, statistics, table and page."""
