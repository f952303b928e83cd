from tests.dashboard.conftest import admin, fail, many_events, member
from tests.store.conftest import logins

__all__ = ["admin", "fail", "logins", "many_events", "member"]
