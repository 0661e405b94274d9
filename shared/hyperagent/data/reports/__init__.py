"""Reports about a data set: inspect, show, plan, plot."""
