"""What Tortoise really does with connections, transactions and errors, and all SQL written by hand."""

from tortoise_auth.database.commits import (
    CommitEffect,
    attach,
    on_commit,
    pending_effects,
    unless_kept,
    wait_for,
    wait_uncancelled,
)
from tortoise_auth.database.connections import connection_for, current_connection, prepare
from tortoise_auth.database.dialects import (
    Listener,
    count_changed,
    dialect_of,
    notify,
    reads_naive_times,
    run_statement,
)
from tortoise_auth.database.errors import (
    is_database_failure,
    is_missing_table,
    is_refused_row,
    is_unique_violation,
    outage,
    translated,
    translates_database_errors,
    violated_columns,
)
from tortoise_auth.database.pacing import BATCH_SIZE, batches
from tortoise_auth.database.transactions import transaction
from tortoise_auth.database.wrappers import (
    context_outside_transactions,
    in_caller_transaction,
    is_transaction,
    leave_transactions,
    root_of,
)

__all__ = [
    "BATCH_SIZE",
    "CommitEffect",
    "Listener",
    "attach",
    "batches",
    "connection_for",
    "context_outside_transactions",
    "count_changed",
    "current_connection",
    "dialect_of",
    "in_caller_transaction",
    "is_database_failure",
    "is_missing_table",
    "is_refused_row",
    "is_transaction",
    "is_unique_violation",
    "leave_transactions",
    "notify",
    "on_commit",
    "outage",
    "pending_effects",
    "prepare",
    "reads_naive_times",
    "root_of",
    "run_statement",
    "transaction",
    "translated",
    "translates_database_errors",
    "unless_kept",
    "violated_columns",
    "wait_for",
    "wait_uncancelled",
]
