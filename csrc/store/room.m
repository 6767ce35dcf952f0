-- Who wants room in a full store, and who makes it (member.cc: allocate; eviction.cc; spill.cc: back; the loops around saving and loading) as
-- a state machine, for rumur. tests/torture/model.py checks it, and breaks it.
--
-- UNITS of memory, values of one unit each, and NP processes: each takes WANT units one after the other for a value that it makes, or one
-- to bring a value back, and writes others out when there is none. A process may be killed between any two rules.
-- Left out: patience (here everybody waits for ever, so that whoever would wait in vain is seen), what is in use for good, policies.
const
  NP: 2;  NV: 2;  UNITS: 2;  WANT: 2;
  DEATHS: true;
  STRICT: true;    -- its own rule is checked too, and not only what it is for
  -- tests/torture/model.py sets each to false and demands a violation
  GIVE_UP: true;   -- who finds no room gives up what it has so far, and then waits
  BEYOND: true;    -- who writes out may go beyond the limit for what it needs itself
  TAKE_OVER: true; -- a claim of the dead is nobody's

type
  P: scalarset(NP);
  V: scalarset(NV);
  PC: enum { IDLE, TAKE, SPILL, FREED, WAIT };
  Claim: enum { NONE, LIVING, DEAD };

var
  value: array [V] of record memory: boolean; claim: Claim; end;
  free: 0..UNITS;
  pc: array [P] of PC;
  parts: array [P] of 0..WANT;
  back: array [P] of V;   -- what it brings back, and has claimed; undefined: it makes a value
  spills: array [P] of V;

function wanted(p: P): 1..WANT;
begin if isundefined(back[p]) then return WANT; endif; return 1; end;

function claimable(v: V): boolean;
begin return value[v].claim = NONE | (TAKE_OVER & value[v].claim = DEAD) end;

procedure rest(p: P);
begin
  pc[p] := IDLE; parts[p] := 0; undefine back[p]; undefine spills[p];
end;

ruleset p: P do
  rule "save" pc[p] = IDLE ==> begin pc[p] := TAKE; end;
  ruleset v: V do
    rule "load" pc[p] = IDLE & !value[v].memory & claimable(v) ==>
    begin value[v].claim := LIVING; back[p] := v; pc[p] := TAKE; end;
  end;

  rule "take" pc[p] = TAKE & parts[p] < wanted(p) & free > 0 ==>
  begin free := free - 1; parts[p] := parts[p] + 1; end;
  -- A value that was made is used and removed; what was brought back lies in memory.
  rule "done" pc[p] = TAKE & parts[p] = wanted(p) ==>
  begin
    if isundefined(back[p]) then free := free + parts[p];
    else value[back[p]].memory := true; value[back[p]].claim := NONE; endif;
    rest(p);
  end;

  ruleset v: V do
    rule "make room" pc[p] = TAKE & parts[p] < wanted(p) & free = 0 & value[v].memory & claimable(v) ==>
    begin value[v].claim := LIVING; spills[p] := v; pc[p] := SPILL; end;
  end;
  rule "written out" pc[p] = SPILL & (BEYOND | free > 0) ==>
  begin value[spills[p]].memory := false; free := free + 1; pc[p] := FREED; end;
  rule "let go" pc[p] = FREED ==>
  begin value[spills[p]].claim := NONE; undefine spills[p]; pc[p] := TAKE; end;

  rule "full" pc[p] = TAKE & parts[p] < wanted(p) & free = 0 & (forall v: V do !value[v].memory | !claimable(v) end) ==>
  begin
    if GIVE_UP then free := free + parts[p]; parts[p] := 0; endif;
    if !isundefined(back[p]) then value[back[p]].claim := NONE; undefine back[p]; endif;
    pc[p] := WAIT;
  end;
  -- Again; it looks for the value first.
  rule "again" pc[p] = WAIT & (parts[p] = 0 | free > 0) ==>
  begin if parts[p] = 0 then rest(p); else pc[p] := TAKE; endif; end;

  rule "killed" DEATHS & pc[p] != IDLE ==>
  begin
    free := free + parts[p];
    if !isundefined(back[p]) then value[back[p]].claim := DEAD; endif;
    if !isundefined(spills[p]) then value[spills[p]].claim := DEAD; endif;
    rest(p);
  end;
end;

startstate begin
  undefine back; undefine spills;
  for v: V do value[v].memory := true; value[v].claim := NONE; endfor;
  free := UNITS - NV;
  for p: P do pc[p] := IDLE; parts[p] := 0; endfor;
end;

invariant "who waits holds nothing that others need"
  STRICT -> forall p: P do pc[p] = WAIT -> (parts[p] = 0 & isundefined(back[p])) end;
liveness "everybody gets room" (forall p: P do pc[p] = IDLE end) & (forall v: V do value[v].claim != LIVING end);
liveness "what is on disk can be brought back" forall v: V do value[v].memory end;
