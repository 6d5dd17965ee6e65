"""Search on Ray Tune: the space and its points, trials that are runs, their ranking and the report."""
