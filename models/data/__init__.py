"""A shop's history: canonical tables, the readers and the simulator that make them, and the log for training."""

from models.data.cleaning import canonical
from models.data.readers import online_retail, read_tables, retailrocket
from models.data.tables import DataError, Finding, Report, Tables

__all__ = ["DataError", "Finding", "Report", "Tables", "canonical", "online_retail", "read_tables", "retailrocket"]
