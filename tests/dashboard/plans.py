"""What a query of a page reads, by its plan."""

import json
from typing import Any

from django.db import connection, transaction


def explained(in_order: str, sql: str, params: Any, *, but: str = "no table") -> tuple[int, set[str]]:
    """Return how many pages a query touches, which runs after `in_order`; and the kinds of its nodes on
    our tables, but for those with this in their names."""
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute(in_order)
        cursor.execute(f"explain (analyze, buffers, format json) {sql}", params)
        ((plan,),) = cursor.fetchall()
        transaction.set_rollback(True)
    plan = (plan if isinstance(plan, list) else json.loads(plan))[0]["Plan"]

    def nodes(node: Any) -> Any:
        yield node
        for inner in node.get("Plans", []):
            yield from nodes(inner)

    ours = [node for node in nodes(plan) if node.get("Relation Name", "").startswith("spark_outbox_")]
    kinds = {node["Node Type"] for node in ours if but not in node["Relation Name"]}
    return plan["Shared Hit Blocks"] + plan["Shared Read Blocks"], kinds
