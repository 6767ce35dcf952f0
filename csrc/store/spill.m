-- The protocol of values that go to disk and come back (spill.cc: out, back, sweep; catalogue_memory.cc: hold_for_writing) as a state machine, for
-- rumur. tests/torture/model.py checks it, and breaks it.
--
-- One name, NC cells that it moves between, NF files, NP processes, each of which may be killed between any two rules, and another comes in
-- its place. A rule is one access to shared memory, or to a file, that others can notice. The name moves by one exchange of its slot
-- (catalogue.m has what that takes): `here` is its cell.
--
-- A value is a number; who writes to it makes it another one. `latest` is what was written last: memory, or else the file, must have it.
-- Stands for: `fresh`, that the life of the cell that somebody has read is still the cell's. A file's number is its cell's and that
-- life's: `own[c]` in this life. Dead processes' holds are taken back at once (ledger.m).
-- Not modelled: policies, room (room.m), other names of the same blocks, torn writes of a file (it is renamed when it is whole).
const
  NP: 2;  NC: 2;  NF: 3;
  VALUES: 2;            -- so many different ones are written
  DEATHS: 0;            -- at most so many; 0: any number
  WRITERS: true;        -- some write; else they only move the value, and sweep
  SWEEPS: true;         -- some remove files that nobody has
  SAVES: true;          -- some save another value under the name
  -- the protocol; tests/torture/model.py sets each to false and demands a violation
  COUNT: true;          -- who has claimed looks whether somebody holds the value
  CLAIMED: true;        -- who is about to write looks whether somebody has claimed it
  FLAG: true;           -- and has said that no file has it any more
  LIFE: true;           -- what is said of a cell is said of one life
  KEEP: true;           -- the file is looked for at the name's cell before it goes with an old one
  TAKE_BACK: true;      -- who finds that the name has gone from the cell takes back what it said, and then removes the file
  CLAIM_TO_SWEEP: true; -- who removes a file that nobody has claims the cell that it is named after
  LOOK_AGAIN: true;     -- and looks again

type
  P: scalarset(NP);
  C: scalarset(NC);
  F: scalarset(NF);
  V: 0..VALUES-1;
  PC: enum {
    IDLE,
    COUNTS, COPY, TELL, STANDS, UNDO, OUT, FORGET, LET_GO,  -- out
    READ, BACK,                                             -- and back
    HOLD, LOOK, SURE, WRITE,                                -- written to
    CLAIMS, TOLD, TAKE, AGAIN, REMOVE,                      -- files that nobody has
    OVER                                                    -- another value is saved under the name
  };
  Place: enum { NOTHING, MEMORY, DISK };

var
  here: C;                                        -- the name's cell
  cell: array [C] of record
    st: Place; value: V; written: boolean;
    marked: boolean;                              -- somebody is about to take the name from it
    told: boolean; file: F;                       -- the file that it says it has
    has_own: boolean; own: F;                     -- the number that a file written in this life gets
    claimed: boolean; claim: P; orphan: boolean;
  end;
  file: array [F] of record there: boolean; value: V; end;
  latest: V;
  moves: array [P] of boolean;                    -- a file has changed hands since this process looked
  pc: array [P] of PC;
  at: array [P] of C;  fresh: array [P] of boolean;
  mine: array [P] of boolean;                     -- it has claimed `at`
  gone: array [P] of boolean;                     -- another value has been saved since it found this one
  holds: array [P] of boolean;                    -- and holds its blocks, of that life
  copy: array [P] of F;                           -- the file that it writes, has found, or may remove
  deaths: 0..DEATHS;

procedure rest(p: P);
begin
  if mine[p] & cell[at[p]].claimed & !cell[at[p]].orphan & cell[at[p]].claim = p then
    cell[at[p]].claimed := false; undefine cell[at[p]].claim;
  endif;
  pc[p] := IDLE; undefine at[p]; undefine copy[p];
  fresh[p] := false; mine[p] := false; holds[p] := false; moves[p] := false; gone[p] := false;
end;

function claimable(c: C): boolean;
begin return !cell[c].claimed | cell[c].orphan end;

procedure take(p: P; c: C);
begin cell[c].claimed := true; cell[c].claim := p; cell[c].orphan := false; mine[p] := true; end;

function named(p: P): boolean;  -- the slot has not moved since
begin return fresh[p] & here = at[p] end;

function unheld(c: C; but: P): boolean;
begin
  for q: P do
    if q != but & holds[q] & !isundefined(at[q]) & at[q] = c & fresh[q] then return false; endif;
  endfor;
  return true;
end;

-- Nobody's any more: no cell says it has it, or would write it.
function unused(f: F): boolean;
begin
  if file[f].there then return false; endif;
  for c: C do
    if cell[c].told & cell[c].file = f then return false; endif;
    if cell[c].has_own & cell[c].own = f then return false; endif;
  endfor;
  for p: P do if !isundefined(copy[p]) & copy[p] = f then return false; endif; endfor;
  return true;
end;

-- The name's value moves to a cell that is free, which begins a life; the old one is free again when its file has been seen to.
procedure move(next: C; st: Place; v: V);
begin
  cell[next].st := st; cell[next].value := v; cell[next].written := false;
  cell[next].told := false; undefine cell[next].file; cell[next].marked := false;
  cell[next].has_own := false; undefine cell[next].own;
  for q: P do if !isundefined(at[q]) & at[q] = next then fresh[q] := false; endif; endfor;
  here := next;
  for q: P do moves[q] := true; endfor;
end;
procedure wipe(c: C);
begin
  cell[c].st := NOTHING; cell[c].value := 0; cell[c].written := false;
  cell[c].has_own := false; undefine cell[c].own;
end;
procedure forget(c: C);
begin
  if cell[c].told & (!KEEP | !cell[here].told | cell[here].file != cell[c].file) then
    file[cell[c].file].there := false; file[cell[c].file].value := 0;
  endif;
  cell[c].told := false; undefine cell[c].file;
end;

ruleset p: P do
  -- out
  rule "out: claim" pc[p] = IDLE & cell[here].st = MEMORY & claimable(here) ==>
  begin at[p] := here; fresh[p] := true; take(p, here); pc[p] := COUNTS; end;
  rule "out: count" pc[p] = COUNTS ==>
  begin
    if !named(p) | (COUNT & !unheld(at[p], p)) then rest(p);
    elsif cell[at[p]].told & !cell[at[p]].written then copy[p] := cell[at[p]].file; pc[p] := OUT;
    else holds[p] := true; pc[p] := COPY; endif;
  end;
  ruleset f: F do
    rule "out: write" pc[p] = COPY & (!fresh[p] | cell[at[p]].has_own | unused(f)) &
                      (!fresh[p] | !cell[at[p]].has_own | cell[at[p]].own = f) ==>
    begin
      holds[p] := false;
      if !named(p) then rest(p);
      else
        cell[at[p]].has_own := true; cell[at[p]].own := f;
        file[f].there := true; file[f].value := cell[at[p]].value;
        copy[p] := f; pc[p] := TELL;
      endif;
    end;
  end;
  rule "out: tell" pc[p] = TELL ==>
  begin
    if fresh[p] | !LIFE then
      if cell[at[p]].told & cell[at[p]].file != copy[p] then file[cell[at[p]].file].there := false; endif;
      cell[at[p]].told := true; cell[at[p]].file := copy[p];
    endif;
    pc[p] := STANDS;
  end;
  rule "out: stands?" pc[p] = STANDS ==>
  begin if named(p) & !cell[at[p]].marked then pc[p] := OUT; else pc[p] := UNDO; endif; end;
  rule "out: take back" pc[p] = UNDO ==>
  begin
    if TAKE_BACK & fresh[p] & cell[at[p]].told & cell[at[p]].file = copy[p] then
      cell[at[p]].told := false; undefine cell[at[p]].file;
    endif;
    file[copy[p]].there := false; file[copy[p]].value := 0;
    rest(p);
  end;
  rule "out: a copy is enough" pc[p] = OUT ==> begin rest(p); end;
  ruleset c: C do
    rule "out: exchange" pc[p] = OUT & cell[c].st = NOTHING ==>
    begin
      if named(p) then move(c, DISK, 0); cell[c].told := true; cell[c].file := copy[p]; pc[p] := FORGET; else rest(p); endif;
    end;
  end;
  rule "forget file" pc[p] = FORGET ==> begin forget(at[p]); pc[p] := LET_GO; end;
  rule "let go" pc[p] = LET_GO ==> begin wipe(at[p]); rest(p); end;

  -- back; two may be at it
  rule "back: claim" pc[p] = IDLE & cell[here].st = DISK ==>
  begin at[p] := here; fresh[p] := true; if claimable(here) then take(p, here); endif; pc[p] := READ; end;
  rule "back: read" pc[p] = READ ==>
  begin
    if !named(p) | !file[cell[at[p]].file].there then
      if named(p) then error "the value's file is gone"; endif;
      rest(p);
    else copy[p] := cell[at[p]].file; pc[p] := BACK; endif;
  end;
  ruleset c: C do
    rule "back: exchange" pc[p] = BACK & cell[c].st = NOTHING ==>
    begin
      if named(p) then move(c, MEMORY, file[copy[p]].value); cell[c].told := true; cell[c].file := copy[p]; pc[p] := FORGET; else rest(p); endif;
    end;
  end;

  -- written to
  rule "write: flag" WRITERS & pc[p] = IDLE & cell[here].st = MEMORY ==>
  begin at[p] := here; fresh[p] := true; if FLAG then cell[here].written := true; endif; pc[p] := HOLD; end;
  rule "write: hold" pc[p] = HOLD ==>
  begin if fresh[p] & cell[at[p]].st = MEMORY then holds[p] := true; pc[p] := LOOK; else rest(p); endif; end;
  rule "write: claimed?" pc[p] = LOOK ==>
  begin
    if CLAIMED & cell[at[p]].claimed & !cell[at[p]].orphan then rest(p); else pc[p] := SURE; endif;
  end;
  rule "write: still named?" pc[p] = SURE ==>
  begin
    if named(p) then
      pc[p] := WRITE;
    else rest(p); endif;
  end;
  ruleset v: V do
    rule "write" pc[p] = WRITE & v != latest ==>
    begin
      if fresh[p] then cell[at[p]].value := v; endif;
      if !gone[p] then latest := v; endif;
    end;
  end;
  rule "write: done" pc[p] = WRITE ==> begin rest(p); end;

  -- another value; who exchanges ends the marks of all
  rule "over: mark" SAVES & pc[p] = IDLE & !cell[here].marked ==>
  begin at[p] := here; fresh[p] := true; cell[here].marked := true; pc[p] := OVER; end;
  ruleset c: C do ruleset v: V do
    rule "over: exchange" pc[p] = OVER & cell[c].st = NOTHING ==>
    begin
      if named(p) then
        move(c, MEMORY, v); latest := v; pc[p] := FORGET;
        for q: P do gone[q] := pc[q] != IDLE; endfor;
      else rest(p); endif;
    end;
  end; end;

  -- files that nobody has
  ruleset c: C do
    rule "sweep: look" SWEEPS & pc[p] = IDLE & cell[c].has_own & file[cell[c].own].there ==>
    begin at[p] := c; fresh[p] := true; copy[p] := cell[c].own; moves[p] := false; pc[p] := CLAIMS; end;
  end;
  rule "sweep: claimed?" pc[p] = CLAIMS ==>
  begin
    if fresh[p] & cell[at[p]].claimed & !cell[at[p]].orphan then rest(p); else pc[p] := TOLD; endif;
  end;
  rule "sweep: told?" pc[p] = TOLD ==>
  begin
    if moves[p] | exists c: C do cell[c].told & cell[c].file = copy[p] end then rest(p);
    else pc[p] := TAKE; endif;
  end;
  rule "sweep: claim" pc[p] = TAKE ==>
  begin
    if !CLAIM_TO_SWEEP then pc[p] := REMOVE;
    elsif claimable(at[p]) then take(p, at[p]); pc[p] := AGAIN;
    else rest(p); endif;
  end;
  rule "sweep: again" pc[p] = AGAIN ==>
  begin
    if LOOK_AGAIN & (moves[p] | (cell[at[p]].told & cell[at[p]].file = copy[p])) then rest(p); else pc[p] := REMOVE; endif;
  end;
  rule "sweep: remove" pc[p] = REMOVE ==>
  begin file[copy[p]].there := false; file[copy[p]].value := 0; rest(p); end;

  rule "killed" pc[p] != IDLE & (DEATHS = 0 | deaths < DEATHS) ==>
  begin
    if DEATHS != 0 then deaths := deaths + 1; endif;
    for c: C do
      if cell[c].claimed & !cell[c].orphan & cell[c].claim = p then cell[c].orphan := true; undefine cell[c].claim; endif;
    endfor;
    if pc[p] = FORGET then forget(at[p]); wipe(at[p]); elsif pc[p] = LET_GO then wipe(at[p]); endif;  -- a sweep's work
    mine[p] := false;
    if pc[p] = OVER & fresh[p] then cell[at[p]].marked := false; endif;  -- so is that
    rest(p);
  end;
end;

ruleset first: C do startstate begin
  undefine cell; undefine file; undefine here; deaths := 0; latest := 0;
  for c: C do
    cell[c].st := NOTHING; cell[c].value := 0; cell[c].written := false; cell[c].told := false; cell[c].marked := false;
    cell[c].has_own := false; cell[c].claimed := false; cell[c].orphan := false;
  endfor;
  for f: F do file[f].there := false; file[f].value := 0; endfor;
  for p: P do undefine at[p]; undefine copy[p]; pc[p] := IDLE; fresh[p] := false; mine[p] := false; holds[p] := false;
              moves[p] := false; gone[p] := false; endfor;
  here := first; cell[first].st := MEMORY;
end; end;

invariant "no write is lost in memory" cell[here].st = MEMORY -> cell[here].value = latest;
invariant "no write is lost on disk"
  cell[here].st = DISK -> (cell[here].told & file[cell[here].file].there & file[cell[here].file].value = latest);
-- What will be given up without a write.
invariant "a file that is believed is there, and has what was written last"
  (cell[here].st = MEMORY & cell[here].told & !cell[here].written) ->
    (file[cell[here].file].there & file[cell[here].file].value = latest);
liveness "all comes to rest" forall p: P do pc[p] = IDLE end;
