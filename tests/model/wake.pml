/* The wake protocol as a model for spin, which visits every state that it can get into.

Checked: no committed event waits while all living workers sleep for ever.

    spin -a wake.pml && gcc -O2 -DSAFETY -DNOREDUCE -o pan pan.c && ./pan -m12000000

finds no errors. With FAILURES, sessions break, workers die or stop, and emits are cancelled. With
SUPERVISED=n the first n workers have one supervisor, and share the watch: see processes/watch.py. Each of
the other names in an #ifdef gets something wrong, and spin finds how that loses an event:

    spin -a -DNO_PROBE wake.pml && gcc -O2 -DSAFETY -DNOREDUCE -DBFS -o pan pan.c && ./pan
    spin -DNO_PROBE -t -p wake.pml

tests/model/test_model.py does this for all of them, and holds the order of the steps against the code:
"sql: NAME" is where a statement of store/ runs, "trigger: NAME" a call in a condition of the trigger or in its function,
of migrations/sql/0001_wake.sql. The rest follows

    Worker._work, Sleep.run, Cycle.run, Session.recover, Claims.next, Supervisor._pass_on,
    Wake.stop_listening, Wake.fall_asleep, Wake.wake_up, Wake.parting, Wake.wait

What one session does and another can notice is a step of its own, and all orders of the steps are
tried. The fallback poll is left out: it finds any event in the end. So is what a clock wakes for, due
and ordered events; and duplicates. An Emitter is any session that emits, a worker's too. Once it has
S, a worker looks: LOOK also sees what others have locked. If there are events, it claims, and
looks once more before it sleeps. It LISTENs from before it takes S until the claim after its sleep.
A worker may also fall asleep without another claim after a batch; or claim again and again, as it does
while events come fast. One that is woken may leave the event to another worker, and just look: that has
let S go by then, so this one has not.

The steps of a commit are in the order of CommitTransaction() in PostgreSQL's xact.c: PreCommit_Notify
and RecordTransactionCommit; ProcArrayEndTransaction, from when on others see the rows;
ResourceOwnerRelease of RESOURCE_RELEASE_LOCKS; AtCommit_Notify, which signals the backends that
LISTEN. Interrupts are held off meanwhile, so that no session ends in between. */

#ifndef WORKERS
#define WORKERS 2
#endif
#ifndef EMITTERS
#define EMITTERS 2
#endif
#ifndef SUPERVISED
#define SUPERVISED 0
#endif
#define NOBODY WORKERS
#define ME (1 << _pid)

byte pending;                   /* committed events that are not handled yet */
byte locked;                    /* how many of them a worker has claimed */

byte k_shared, s_shared;        /* the advisory locks: how many sessions hold them shared, */
bool k_exclusive, s_exclusive;  /* and whether one holds them exclusively */

byte listening;                 /* one bit for each worker: its session LISTENs; */
byte unread;                    /* there is a notification for it in the server's list; */
byte signalled;                 /* its backend has been told to look there */

byte spare;                     /* one bit for each worker: its supervisor knows that it is idle; */
byte watching;                  /* and has given it the watch */

byte living = WORKERS;
byte broken = NOBODY;           /* the worker that is about to lose its session */

/* The worker */

inline claim() {                /* LIMIT 1: a larger batch is like one after the other */
    if
    :: pending > locked -> claimed = true; locked++
    :: else
    fi
}

inline take_s() {
    if
    :: atomic { !s_exclusive -> s_shared++; holds_s = true }
#ifndef SLEEP_WITHOUT_S
    :: atomic { else -> is_safe = false }           /* an emitter tests it this instant */
#else
    :: atomic { else }
#endif
    fi
}

inline let_go_of_s() {
    s_shared--;
    holds_s = false
}

inline probe_k() {
    if
    :: !is_safe
    :: atomic { is_safe && k_shared == 0 && !k_exclusive -> k_exclusive = true; holds_k = true };
       atomic { k_exclusive = false; holds_k = false }
    :: atomic { else -> is_safe = false };          /* an emit is in flight, or another probes it */
       if
       :: atomic { holds_s -> let_go_of_s() }
       :: skip                                      /* the pauses have grown */
       fi
    fi
}

inline unlisten() {
    listening = listening & ~ME;
    forget_notifications()
}

inline look() {
    atomic {
        if
#ifndef LOOK_PAST_LOCKED
        :: pending == 0
#else
        :: pending == locked
#endif
        :: else -> is_safe = false;
           claim();
           if
           :: claimed -> goto next
           :: else                                  /* others hold them: it looks again soon */
           fi
        fi
    }
}

inline forget_notifications() {
    signalled = signalled & ~ME;
    unread = unread & ~ME
}

active [WORKERS] proctype Worker() {
    bool holds_s, holds_k, claimed;
    bool is_safe;                                   /* to sleep for ever */
start:
    {
next:
    do
    :: atomic { listening & ME -> unlisten() }      /* sql: UNLISTEN */
    :: atomic { holds_s -> spare = spare & ~ME; let_go_of_s() }  /* sql: LET_GO_OF_S */
    :: atomic { !holds_s && claimed -> claimed = false; locked--; pending-- }
    :: atomic { !holds_s && claimed -> claimed = false; locked-- }  /* the batch failed, or was cut */
    :: atomic { !holds_s && !claimed ->
           if
           :: claim()                               /* sql: CLAIM_READY */
           :: skip                                  /* it does not claim, or all is below the floor */
           fi;
           if
           :: claimed -> spare = spare & ~ME; goto next
           :: else
           fi
       };
#if SUPERVISED > 0
       if
       :: _pid < SUPERVISED ->                      /* Sleep._is_our_turn */
          atomic { spare = spare | ME };
          if
          :: watching & ME
          :: atomic { !(watching & ME) -> unlisten() };
             atomic { watching & ME }               /* it rests */
          fi
       :: else
       fi;
#endif
       atomic {                                     /* Sleep.run */
           if
           :: forget_notifications()                /* they came while it was awake */
           :: skip                                  /* or its backend is late to read them */
           fi;
           is_safe = true
       };
#ifndef LISTEN_LAST
       listening = listening | ME;                  /* sql: LISTEN */
#endif
#if defined(PROBE_BEFORE_S)
       probe_k(); take_s(); look();
#elif defined(LOOK_BEFORE_PROBE)
       take_s(); look(); probe_k();
#elif defined(NO_PROBE)
       take_s(); look();
#elif defined(NO_SECOND_LOOK)
       take_s(); probe_k();
#else
       take_s();                                    /* sql: TAKE_S */
       probe_k();                                   /* sql: PROBE_K */
       look();                                      /* sql: LOOK */
#endif
#ifdef LISTEN_LAST
       listening = listening | ME;
#endif
asleep:
       if
       :: !is_safe                                  /* a pause: it looks again soon */
       :: atomic { is_safe && (signalled & unread & ME) ->
#ifndef FORGET_AFTER_LOOK
              forget_notifications()
#endif
          };
          if
          :: is_safe = false
          :: atomic { is_safe = pending == 0 };     /* another may be quicker, as the last time */
#ifdef FORGET_AFTER_LOOK
             forget_notifications();
#endif
             if
             :: is_safe -> goto asleep
             :: else
             fi
          fi
       fi
    od
    } unless { atomic { broken == _pid ->
        broken = NOBODY;
        listening = listening & ~ME;
        forget_notifications();
        spare = spare & ~ME;
        run Ghost(holds_s, holds_k, claimed);
        holds_s = false; holds_k = false; claimed = false; is_safe = false
    } };
    if
    :: goto start                                   /* Session.recover: it connects again */
    :: atomic { living > 1 -> living--;             /* it has died, or was told to stop */
#ifndef NO_PASS_ON
           watching = watching & ~ME
#endif
       }
    fi
}

/* What is left of a session until the server notices that nobody is there any more. */
proctype Ghost(bool holds_s, holds_k, claimed) {
    atomic { locked = locked - claimed; claimed = false };
    atomic { s_shared = s_shared - holds_s; k_exclusive = k_exclusive && !holds_k }
}

/* The supervisor */

#if SUPERVISED > 0
inline give_watch() {
    if
    :: spare & 1 -> watching = 1
    :: spare & 2 -> watching = 2
    fi
}

active proctype Supervisor() {
end:
    do
    :: atomic { spare && !watching -> give_watch() }
#ifndef NO_PASS_ON
    :: atomic { watching && spare && !(spare & watching) -> give_watch() }  /* it works for too long */
#endif
    od
}
#endif

/* The emitter */

inline take_k() {
    if
    :: !k_exclusive -> k_shared++; holds_k = true
    :: else ->                                      /* a worker probes it this instant */
#ifndef SILENT_IF_PROBED
       notifies = true;
#endif
       goto ready
    fi
}

inline release_k() {
    k_shared = k_shared - holds_k;
    holds_k = false
}

inline test_s() {
    if
    :: s_shared == 0 && (!s_exclusive || keeps_s) -> s_exclusive = true
    :: else -> notifies = true; goto ready          /* somebody sleeps */
    fi
}

inline unlock_s() {
    if
    :: s_exclusive = keeps_s
#ifdef FAILURES
    :: atomic { release_k(); keeps_s = true; goto idle }  /* cancelled: the session keeps S */
#endif
    fi
}

inline become_visible() {
    pending++;
    if
    :: notifies -> unread = unread | listening
    :: else
    fi
}

inline signal() {
    if
    :: notifies -> signalled = signalled | listening; notifies = false
    :: else
    fi
}

active [EMITTERS] proctype Emitter() {
    bool holds_k, notifies, keeps_s;
idle:
    do
    :: atomic { pending == locked ->                /* else a lost event might be found by luck */
#ifdef K_AFTER_CHECK
           test_s() }; unlock_s(); atomic { take_k() };
#else
           take_k() };                              /* trigger: pg_try_advisory_xact_lock_shared(K) */
       atomic { test_s() };                         /* trigger: pg_try_advisory_lock(S) */
       unlock_s();                                  /* trigger: pg_advisory_unlock(S) */
#endif
ready:                                              /* trigger: pg_notify, if not all went well */
#ifdef K_TO_STATEMENT_END
       atomic { release_k() };
#endif
       if
       :: atomic { release_k(); notifies = false }  /* it rolls back */
#if defined(LOCKS_BEFORE_VISIBLE)
       :: atomic { release_k() }; atomic { become_visible() }; atomic { signal() }
#elif defined(SIGNAL_BEFORE_VISIBLE)
       :: atomic { unread = unread | (notifies -> listening : 0); signal() };
          atomic { become_visible() }; atomic { release_k() }
#else
       :: atomic { become_visible() }; atomic { release_k() }; atomic { signal() }
#endif
       fi
#ifdef FAILURES
    :: atomic { keeps_s -> keeps_s = false; s_exclusive = false }  /* its session ends */
#endif
    od
}

#ifdef FAILURES
active proctype Fate() {
    do
    :: atomic { broken == NOBODY && _nr_pr == WORKERS + EMITTERS + 2 + (SUPERVISED > 0) ->
           if
           :: broken = 0
           :: broken = 1
           fi
       }
    :: break
    od
}
#endif

/* When nobody can do anything any more, no event may lie there. */
active proctype Monitor() {
    timeout -> assert(pending == locked)
}
