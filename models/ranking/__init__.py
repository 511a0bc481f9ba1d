"""Rankers: learned fusions of what the sources say."""
