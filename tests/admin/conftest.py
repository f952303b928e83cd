from tests.dashboard.conftest import admin, fail, many_events, member

__all__ = ["admin", "fail", "many_events", "member"]
