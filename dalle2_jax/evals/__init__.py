"""Measures of drawn pictures: one file a metric."""
