"""Reports: statistics, tables and figures of finished comparisons."""
