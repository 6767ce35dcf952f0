-- The protocol of ledger_impl.h, tickets_impl.h, reaper_impl.h, slots.h and membership.cc as a state machine, for rumur.
--   tests/torture/model.py        (the short configurations; --full: all of them; it also breaks the protocol and looks whether that is seen)
--   rumur --deadlock-detection off ledger.m -o l.c && gcc -O3 -mcx16 l.c -o l -lpthread && ./l      (this one configuration)
--
-- One block, NP leases, NC tickets, NM messages, generations up to MAXG. Every process may be killed between any two rules. A rule is
-- one access to shared memory that others can notice, or several of which all but one are private or can't be told apart; see "merged".
-- Reapers and joiners look at the leases one by one, in any order.
--
-- Stands for: `moved`, that the block's sequence number is not what it was when it was read (it has 36 bits; that they wrap in the
-- meantime is left out); `stale`, the same of a lease's word with its incarnation; `fresh`, that a copy of a ticket's nonce still is that
-- of a ticket that is out. The kernel's lock on a lease's byte: held while the process lives, or a parent that has forked has it open.
-- Merged: load and exchange of a loop that retries until its exchange succeeds; an intent with its generation and the value read before
-- it, since what is done under it compares again; the looks at a lease's word, its lock, and its word again, since incarnations are never
-- used twice; a lease's intent and whether it is dead, since the dead stay dead; lock and claim of a slot.
-- Not modelled: memory orders (tests/torture/relacy), several blocks, space and chunks, names, fork without handlers, closed descriptors.
--
-- No violation, with the leases' symmetry used, on one core of a busy machine:
--   NP=2 NC=1 NM=1 MAXG=2                                 212,358 states      3 s
--   NP=2 NC=2 NM=2 MAXG=2                               1,759,385 states     33 s
--   NP=3 MAXG=1, no messages, no fork                   1,778,712 states     59 s
--   NP=3 NC=1 NM=1 MAXG=1 DEATHS=1, no fork             1,612,576 states     45 s
--   NP=3 MAXG=1 DEATHS=2, no messages, fork             1,830,811 states     53 s
const
  NP: 2;  NC: 1;  NM: 1;  MAXG: 2;
  DEATHS: 0;            -- at most so many; 0: any number
  MESSAGES: true;       -- issue, receive, redeem, take back
  FORK: true;
  SUCCEED: true;        -- when all leases are taken, join in place of a dead one
  STRICT: true;         -- also the protocol's own rules, and not only what they are there for
  -- the protocol; tests/torture/model.py sets each to false and demands a violation
  LOOK_FIRST: true;     -- settle looks at the intents before it counts
  LOOK_TWICE: true;     -- and again after it has counted
  SEQUENCE: true;       -- settle's exchange fails when the block's word has moved
  DROP_INTENT: true;    -- the dead one's bits are dropped under the reaper's own intent
  ANNOUNCEMENTS: true;  -- a joiner looks whether anybody is still taking the slot back
  LOOK_AGAIN: true;     -- a reaper looks again whether the lease is dead after it has announced
  COUNT_FIRST: true;    -- the count goes up before the bit appears
  INTENT_FIRST: true;   -- attach's intent is up before the count is
  NONCE: true;          -- a ticket is taken only by who knows its nonce

type
  P: scalarset(NP);
  C: scalarset(NC);
  M: scalarset(NM);
  Gen: 0..MAXG;
  Cnt: 0..7;
  PC: enum {
    OUT,                -- no process, the slot is free
    CLAIMED, HEIR,      -- a joiner looks at the announcements; claimed by a parent for its child
    IDLE, DEAD,
    ALLOC, BIT,         -- next: exchange; bit
    ATTACH, ATTACHED,   -- next: count + 1 (bit follows); intent off
    LATE,               -- next: intent (only without INTENT_FIRST)
    REDEEM,             -- next: the second intent
    ISSUE, CLAIM, ISSUED, SEND,
    TICKET, DROP,       -- next: ticket cleared; bit cleared
    DOWN, CLOSE,          -- next: count - 1; intent off
    LOOK, FORKING, FORKED,  -- a parent
    SEEN, ANNOUNCED, R_INTENT, R_BIT, S_LOAD, S_FIRST, S_BITS, S_TICKETS, S_SECOND, S_CAS, R_DONE, R_REST, R_DROP, R_ITS, R_FREE, R_LEAVE,
    TAKEOVER            -- a joiner has locked a dead lease's byte
  };

var
  -- shared memory
  live: boolean;  gen: Gen;  cnt: Cnt;                        -- the block's word
  bit: array [P] of boolean;
  intent: array [P] of boolean;  igen: array [P] of Gen;      -- (there is one block)
  word: array [P] of boolean;                                 -- the lease's word is not "free"
  reaping: array [P] of P;                                    -- announcements
  out: array [C] of boolean;                                  -- tickets
  msg: array [M] of record there: boolean; gen: Gen; cell: C; fresh: boolean; end;
  -- private memory
  pc: array [P] of PC;
  held: array [P] of Gen;                                     -- undefined: does not hold the block
  tgen: array [P] of Gen;  tcell: array [P] of C;  tfresh: array [P] of boolean;  -- the handle at work
  heir: array [P] of P;                                       -- whose byte this process has locked besides its own
  dead: array [P] of P;  stale: array [P] of boolean;         -- whom it takes back
  sgen: array [P] of Gen;  settled: array [P] of boolean;  moved: array [P] of boolean;  sum: array [P] of Cnt;
  seen: array [P] of array [P] of boolean;  seenc: array [P] of array [C] of boolean;
  deaths: 0..DEATHS;

procedure write(l: boolean; g: Gen; n: Cnt);
begin
  live := l; gen := g; cnt := n;
  for q: P do if !isundefined(moved[q]) then moved[q] := true; endif; endfor;
end;

procedure put_word(p: P; l: boolean);
begin
  word[p] := l;
  for q: P do if !isundefined(dead[q]) & dead[q] = p then stale[q] := true; endif; endfor;
end;

procedure begin_intent(p: P; g: Gen);
begin intent[p] := true; igen[p] := g; end;

procedure end_intent(p: P);
begin intent[p] := false; undefine igen[p]; end;

-- Whoever has a copy of the nonce has it in vain from now on.
procedure old_nonce(c: C);
begin
  for k: M do if msg[k].there & msg[k].cell = c then msg[k].fresh := false; endif; endfor;
  for q: P do if !isundefined(tcell[q]) & tcell[q] = c then tfresh[q] := false; endif; endfor;
end;

procedure forget_handle(p: P);
begin undefine tgen[p]; undefine tcell[p]; undefine tfresh[p]; end;

procedure forget_settle(p: P);
begin undefine moved[p]; undefine sum[p]; undefine seen[p]; undefine seenc[p]; end;

procedure forget(p: P);
begin
  forget_handle(p); forget_settle(p);
  undefine held[p]; undefine heir[p]; undefine dead[p]; undefine stale[p]; undefine sgen[p]; undefine settled[p];
end;

procedure look_at_all(p: P);
begin for q: P do seen[p][q] := false; endfor; end;

-- The process at this slot is no more. (Its lease may have been freed while it had only locked the byte.)
procedure end_process(p: P);
begin
  forget(p);
  if word[p] then pc[p] := DEAD; else pc[p] := OUT; endif;
end;

-- The kernel's answer: nobody has its byte locked.
function gone(d: P): boolean;
begin
  if pc[d] != DEAD then return false; endif;
  for q: P do if !isundefined(heir[q]) & heir[q] = d then return false; endif; endfor;
  return true;
end;

function seen_all(p: P): boolean;
begin return forall q: P do seen[p][q] end; end;

function free_slot(): boolean;
begin return exists q: P do !word[q] end; end;

function users(): Cnt;
var n: Cnt;
begin
  n := 0;
  for q: P do if bit[q] then n := n + 1; endif; endfor;
  for c: C do if out[c] then n := n + 1; endif; endfor;
  return n;
end;

ruleset p: P do
  -- join
  rule "claim" pc[p] = OUT & !word[p] ==>
  begin
    put_word(p, true);
    if ANNOUNCEMENTS then look_at_all(p); pc[p] := CLAIMED; else pc[p] := IDLE; endif;
  end;
  ruleset q: P do
    rule "claimed: look at announcement" pc[p] = CLAIMED & !seen[p][q] ==>
    begin
      seen[p][q] := true;
      if !isundefined(reaping[q]) & reaping[q] = p then
        put_word(p, false); undefine seen[p]; pc[p] := OUT;
      elsif seen_all(p) then
        undefine seen[p]; pc[p] := IDLE;
      endif;
    end;
  end;

  -- allocate
  rule "allocate: intent" pc[p] = IDLE & isundefined(held[p]) & !live & gen < MAXG ==>
  begin begin_intent(p, gen + 1); moved[p] := false; pc[p] := ALLOC; end;
  rule "allocate: exchange" pc[p] = ALLOC ==>
  begin
    if moved[p] then pc[p] := CLOSE; else write(true, gen + 1, 1); tgen[p] := gen; pc[p] := BIT; endif;
    undefine moved[p];
  end;
  rule "bit" pc[p] = BIT ==>
  begin
    if isundefined(heir[p]) then bit[p] := true; held[p] := tgen[p]; else bit[heir[p]] := true; endif;
    if isundefined(tcell[p]) & isundefined(heir[p]) then pc[p] := CLOSE; else pc[p] := ATTACHED; endif;
  end;

  -- drop
  rule "drop: intent" pc[p] = IDLE & !isundefined(held[p]) ==>
  begin begin_intent(p, gen); undefine held[p]; pc[p] := DROP; end;
  rule "drop: bit" pc[p] = DROP ==>
  begin if bit[p] then bit[p] := false; pc[p] := DOWN; else pc[p] := CLOSE; endif; end;
  rule "count down" pc[p] = DOWN ==>
  begin
    if live & cnt > 0 then write(cnt > 1, gen, cnt - 1); endif;
    pc[p] := CLOSE;
  end;
  rule "intent off" pc[p] = CLOSE ==>
  begin
    end_intent(p); forget_handle(p);
    if isundefined(dead[p]) then pc[p] := IDLE; else pc[p] := R_ITS; endif;
  end;

  -- send
  rule "issue: intent" MESSAGES & pc[p] = IDLE & !isundefined(held[p]) & exists k: M do !msg[k].there end ==>
  begin begin_intent(p, held[p]); pc[p] := ISSUE; end;
  rule "issue: count up" pc[p] = ISSUE ==>
  begin write(live, gen, cnt + 1); pc[p] := CLAIM; end;
  rule "issue: no ticket left" pc[p] = CLAIM & forall c: C do out[c] end ==> begin pc[p] := DOWN; end;
  ruleset c: C do
    rule "issue: ticket out" pc[p] = CLAIM & !out[c] ==>
    begin
      old_nonce(c); out[c] := true;
      tcell[p] := c; tfresh[p] := true; tgen[p] := igen[p]; pc[p] := ISSUED;
    end;
  end;
  rule "issue: intent off" pc[p] = ISSUED ==> begin end_intent(p); pc[p] := SEND; end;
  ruleset k: M do
    rule "send" pc[p] = SEND & !msg[k].there ==>
    begin
      msg[k].there := true; msg[k].gen := tgen[p]; msg[k].cell := tcell[p]; msg[k].fresh := tfresh[p];
      forget_handle(p); pc[p] := IDLE;
    end;
    -- Receive; the message stays and may be unpickled again.
    rule "receive" MESSAGES & pc[p] = IDLE & msg[k].there ==>
    begin
      tgen[p] := msg[k].gen; tcell[p] := msg[k].cell; tfresh[p] := msg[k].fresh;
      if isundefined(held[p]) then
        if INTENT_FIRST then begin_intent(p, tgen[p]); endif;
        pc[p] := ATTACH;
      elsif held[p] = tgen[p] then pc[p] := REDEEM;
      else forget_handle(p); endif;
    end;
  end;
  rule "could not be sent" pc[p] = SEND & forall k: M do msg[k].there end ==> begin forget_handle(p); pc[p] := IDLE; end;
  rule "attach: count up" pc[p] = ATTACH ==>
  begin
    if live & gen = tgen[p] then
      if COUNT_FIRST then write(live, gen, cnt + 1); endif;
      if INTENT_FIRST then pc[p] := BIT; else pc[p] := LATE; endif;
    elsif INTENT_FIRST then pc[p] := CLOSE;
    else forget_handle(p); pc[p] := IDLE; endif;
  end;
  rule "attach: late intent" !INTENT_FIRST & pc[p] = LATE ==> begin begin_intent(p, tgen[p]); pc[p] := BIT; end;
  rule "attach: intent off" pc[p] = ATTACHED ==>
  begin
    if !COUNT_FIRST & live then write(live, gen, cnt + 1); endif;
    end_intent(p);
    if isundefined(heir[p]) then pc[p] := REDEEM; else forget_handle(p); pc[p] := FORKING; endif;
  end;
  rule "redeem: intent" pc[p] = REDEEM ==> begin begin_intent(p, tgen[p]); pc[p] := TICKET; end;
  rule "clear ticket" pc[p] = TICKET ==>
  begin
    if (NONCE & tfresh[p]) | (!NONCE & out[tcell[p]]) then out[tcell[p]] := false; old_nonce(tcell[p]); pc[p] := DOWN;
    else pc[p] := CLOSE; endif;
  end;
  -- Of the living and of the dead: how old a ticket is does not matter here.
  ruleset c: C do
    rule "take back: intent" pc[p] = IDLE & out[c] ==>
    begin tcell[p] := c; tfresh[p] := true; tgen[p] := gen; begin_intent(p, gen); pc[p] := TICKET; end;
  end;

  -- fork: p is the parent, h the child's lease
  ruleset h: P do
    rule "fork: claim for the child" FORK & pc[p] = IDLE & !isundefined(held[p]) & pc[h] = OUT & !word[h] ==>
    begin
      put_word(h, true); pc[h] := HEIR; heir[p] := h;
      look_at_all(p); pc[p] := LOOK;
    end;
    rule "fork: look at announcement" pc[p] = LOOK & !seen[p][h] ==>
    begin
      seen[p][h] := true;
      if !isundefined(reaping[h]) & reaping[h] = heir[p] then
        put_word(heir[p], false); pc[heir[p]] := OUT; undefine heir[p]; undefine seen[p]; pc[p] := IDLE;
      elsif seen_all(p) then
        undefine seen[p]; tgen[p] := gen;
        begin_intent(p, gen); pc[p] := ATTACH;
      endif;
    end;
  end;
  rule "fork" pc[p] = FORKING ==> begin pc[heir[p]] := IDLE; held[heir[p]] := held[p]; pc[p] := FORKED; end;
  rule "fork: parent closes" pc[p] = FORKED ==> begin undefine heir[p]; pc[p] := IDLE; end;

  -- death
  rule "killed" !(pc[p] = OUT | pc[p] = DEAD | pc[p] = HEIR) & (DEATHS = 0 | deaths < DEATHS) ==>
  begin
    if DEATHS != 0 then deaths := deaths + 1; endif;
    if !isundefined(heir[p]) & pc[heir[p]] = HEIR then pc[heir[p]] := DEAD; endif;
    end_process(p);
  end;

  -- reap
  ruleset d: P do
    rule "reap: seen" pc[p] = IDLE & word[d] & gone(d) ==> begin dead[p] := d; stale[p] := false; pc[p] := SEEN; end;
  end;
  rule "reap: announce" pc[p] = SEEN ==> begin reaping[p] := dead[p]; pc[p] := ANNOUNCED; end;
  rule "reap: look again" pc[p] = ANNOUNCED ==>
  begin if LOOK_AGAIN & (stale[p] | !gone(dead[p])) then pc[p] := R_LEAVE; else pc[p] := R_INTENT; endif; end;
  rule "reap: read intent" pc[p] = R_INTENT ==>
  begin
    if intent[dead[p]] then sgen[p] := igen[dead[p]]; pc[p] := R_BIT; else settled[p] := true; pc[p] := R_REST; endif;
  end;
  rule "reap: clear bit" pc[p] = R_BIT ==> begin bit[dead[p]] := false; pc[p] := S_LOAD; end;
  rule "settle: load" pc[p] = S_LOAD ==>
  begin
    if !live | gen != sgen[p] then settled[p] := true; pc[p] := R_DONE;
    else moved[p] := false; sum[p] := 0; look_at_all(p); if LOOK_FIRST then pc[p] := S_FIRST; else pc[p] := S_BITS; endif; endif;
  end;
  ruleset q: P do
    rule "settle: look at intent" (pc[p] = S_FIRST | pc[p] = S_SECOND) & !seen[p][q] ==>
    begin
      seen[p][q] := true;
      if q != p & q != dead[p] & intent[q] & !(word[q] & gone(q)) then
        forget_settle(p); settled[p] := false; pc[p] := R_DONE;
      elsif seen_all(p) then
        look_at_all(p);
        if pc[p] = S_FIRST then pc[p] := S_BITS; else undefine seen[p]; pc[p] := S_CAS; endif;
      endif;
    end;
    rule "settle: count bit" pc[p] = S_BITS & !seen[p][q] ==>
    begin
      seen[p][q] := true;
      if bit[q] then sum[p] := sum[p] + 1; endif;
      if seen_all(p) then undefine seen[p]; for c: C do seenc[p][c] := false; endfor; pc[p] := S_TICKETS; endif;
    end;
  end;
  ruleset c: C do
    rule "settle: count ticket" pc[p] = S_TICKETS & !seenc[p][c] ==>
    begin
      seenc[p][c] := true;
      if out[c] then sum[p] := sum[p] + 1; endif;
      if forall b: C do seenc[p][b] end then
        undefine seenc[p];
        if LOOK_TWICE then look_at_all(p); pc[p] := S_SECOND; else pc[p] := S_CAS; endif;
      endif;
    end;
  end;
  rule "settle: exchange" pc[p] = S_CAS & (!SEQUENCE | !moved[p]) ==>
  begin
    if live | SEQUENCE then write(sum[p] != 0, gen, sum[p]); endif;
    forget_settle(p); settled[p] := true; pc[p] := R_DONE;
  end;
  rule "settle: again" pc[p] = S_CAS & SEQUENCE & moved[p] ==> begin forget_settle(p); pc[p] := S_LOAD; end;
  rule "settle: too often" pc[p] = S_CAS & SEQUENCE & moved[p] ==>
  begin forget_settle(p); settled[p] := false; pc[p] := R_DONE; end;
  rule "reap: clear intent" pc[p] = R_DONE ==>
  begin
    undefine sgen[p];
    if settled[p] then end_intent(dead[p]); pc[p] := R_REST;
    elsif dead[p] = p then end_process(p);           -- a joiner that gives up: unlocks
    else pc[p] := R_REST; endif;
  end;
  rule "reap: read bits" pc[p] = R_REST ==>
  begin
    if bit[dead[p]] then
      if DROP_INTENT then begin_intent(p, gen); endif;
      pc[p] := R_DROP;
    else pc[p] := R_ITS; endif;
  end;
  rule "reap: drop" pc[p] = R_DROP ==>
  begin
    if bit[dead[p]] then bit[dead[p]] := false; pc[p] := DOWN; else pc[p] := CLOSE; endif;
  end;
  rule "reap: its reaping ended" pc[p] = R_ITS ==>
  begin
    if !settled[p] then pc[p] := R_LEAVE;
    else undefine reaping[dead[p]]; pc[p] := R_FREE; endif;
  end;
  rule "reap: free the slot" pc[p] = R_FREE ==>
  begin
    if dead[p] = p then                                     -- a joiner: a new incarnation
      put_word(p, true); forget(p); pc[p] := IDLE;
    else
      if !stale[p] then
        put_word(dead[p], false);
        if pc[dead[p]] = DEAD then pc[dead[p]] := OUT; endif;
      endif;
      pc[p] := R_LEAVE;
    endif;
  end;
  rule "reap: leave" pc[p] = R_LEAVE ==>
  begin undefine reaping[p]; undefine dead[p]; undefine stale[p]; undefine settled[p]; pc[p] := IDLE; end;

  -- join in place of a dead lease
  rule "succeed: lock" SUCCEED & word[p] & gone(p) & !free_slot() ==>
  begin dead[p] := p; stale[p] := false; look_at_all(p); pc[p] := TAKEOVER; end;
  ruleset q: P do
    rule "succeed: look at announcement" pc[p] = TAKEOVER & !seen[p][q] ==>
    begin
      seen[p][q] := true;
      if !isundefined(reaping[q]) & reaping[q] = p then end_process(p);
      elsif seen_all(p) then
        undefine seen[p];
        if stale[p] then end_process(p); else pc[p] := R_INTENT; endif;
      endif;
    end;
  end;
end;

ruleset k: M do
  rule "message lost" msg[k].there ==> begin undefine msg[k]; msg[k].there := false; end;
end;

startstate begin
  undefine igen; undefine reaping; undefine msg;
  live := false; gen := 0; cnt := 0; deaths := 0;
  for p: P do bit[p] := false; intent[p] := false; word[p] := false; pc[p] := OUT; forget(p); endfor;
  for c: C do out[c] := false; endfor;
  for k: M do msg[k].there := false; endfor;
end;

invariant "what is held is live and of that generation"
  forall p: P do !isundefined(held[p]) -> (live & gen = held[p] & bit[p]) end;
invariant "an unredeemed message finds its block"
  (forall k: M do (msg[k].there & msg[k].fresh) -> (live & gen = msg[k].gen) end) &
  (forall p: P do (!isundefined(tfresh[p]) & pc[p] = ATTACH & tfresh[p]) -> (live & gen = tgen[p]) end);
invariant "the count covers bits and tickets" STRICT -> cnt >= users();
invariant "free means nobody" (STRICT & !live) -> (cnt = 0 & users() = 0);
invariant "no intent, exact count" (STRICT & forall p: P do !intent[p] end) -> cnt = users();
invariant "no leak at rest"
  (forall p: P do pc[p] = OUT | (pc[p] = IDLE & isundefined(held[p])) end & forall c: C do !out[c] end) -> !live;
-- At work: beyond its second look and not yet gone.
invariant "no reaper at a slot that is in use"
  STRICT -> forall p: P do forall r: P do
    !(p != r & !isundefined(dead[r]) & dead[r] = p & pc[r] != SEEN & pc[r] != ANNOUNCED & pc[r] != R_LEAVE) |
    pc[p] = OUT | pc[p] = CLAIMED | pc[p] = DEAD | pc[p] = TAKEOVER |
    (pc[p] = HEIR & exists q: P do pc[q] = LOOK & heir[q] = p end)
  end end;
-- From every state a state can be reached in which all that the dead had is back.
liveness "what the dead used comes back"
  forall p: P do pc[p] != DEAD & (pc[p] = OUT -> (!bit[p] & !intent[p] & isundefined(reaping[p]))) end;
