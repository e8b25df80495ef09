"""What Tortoise really does with connections, transactions and errors, and all SQL written by hand."""

from tortoise_auth.database.connections import (
    connection_for,
    context_outside_transactions,
    current_connection,
    in_caller_transaction,
    is_transaction,
    root_of,
)
from tortoise_auth.database.dialects import Listener, notify, run_statement
from tortoise_auth.database.errors import (
    is_database_failure,
    is_missing_table,
    is_unique_violation,
    translated,
    translates_database_errors,
    violated_columns,
)
from tortoise_auth.database.transactions import transaction, wait_uncancelled, when_committed

__all__ = [
    "Listener",
    "connection_for",
    "context_outside_transactions",
    "current_connection",
    "in_caller_transaction",
    "is_database_failure",
    "is_missing_table",
    "is_transaction",
    "is_unique_violation",
    "notify",
    "root_of",
    "run_statement",
    "transaction",
    "translated",
    "translates_database_errors",
    "violated_columns",
    "wait_uncancelled",
    "when_committed",
]
