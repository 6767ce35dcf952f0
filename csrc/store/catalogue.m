-- The protocol of the catalogue (catalogue.cc: save, overwrite, remove, sweep) as a state machine, for rumur.
--   tests/torture/model.py        (with the pool's own; it also breaks the protocol and looks whether that is seen)
--   rumur --deadlock-detection off catalogue.m -o c.c && gcc -O3 -mcx16 c.c -o c -lpthread && ./c      (this one configuration)
--
-- One name, the NS slots in which it may be, NC cells, NP processes, each of which may be killed between any two rules, and another comes
-- in its place. A rule is one access to shared memory that others can notice.
-- A search reads slot by slot, in any order. Each value keeps one block, by one ticket.
--
-- Stands for: `fresh`, that the life of a cell that somebody has read is still the cell's; `moved`, that the sequence number of a slot, or
-- the step of a cell, is not what it was when it was read (numbers of 32 bits: that they wrap meanwhile is left out).
-- Merged: load and exchange of a loop that retries until its exchange succeeds; an empty slot and one that is free again.
-- Not modelled: other names (their slots are passed over), the index's levels, values of several blocks, expiry (a removal by the
-- sweeper), memory orders, the pool (ledger.m).
const
  NP: 2;  NS: 2;  NC: 2;
  DEATHS: 0;            -- at most so many; 0: any number
  -- the protocol; tests/torture/model.py sets each to false and demands a violation
  RIVALS: true;         -- who has claimed a slot ends the claims of others
  LOOK_AGAIN: true;     -- and then looks for the name once more
  MARK_FIRST: true;     -- a cell is marked before the exchange that takes its name away
  MOVE: true;           -- a sweeper that lets a name stand moves its slot's number
  NOTE_FIRST: true;     -- a ticket is noted before it becomes the name's
  AGAIN_IN_PLACE: true; -- who finds only the number moved marks and exchanges again
  SAME_LIFE: true;      -- a cell is let go only in the life in which it was named

type
  P: scalarset(NP);
  S: scalarset(NS);
  C: scalarset(NC);
  PC: enum {
    IDLE,
    ISSUE, NOTE, KEEP,                            -- a cell is being made
    LOOK, CLAIM, RIVAL, END_RIVAL, AGAIN, UNCLAIM, NAME, STAND, FAIL,
    MARK, EXCHANGE, LET_GO,                       -- a name is taken away or replaced
    REFER, SWEPT, KEPT_NAME,                      -- a dead one's cell is looked at
    GIVE_UP, WIPE, FREE
  };
  Work: enum { SAVE, OVERWRITE, REMOVE, SWEEP };
  SlotState: enum { EMPTY, CLAIMED, NAMED };
  CellState: enum { NOTHING, MAKING, STANDING, LEAVING, RELEASING };
  TicketState: enum { BACK, SENT, KEPT };

var
  -- shared memory
  slot: array [S] of record st: SlotState; cell: C; fresh: boolean; end;
  cell: array [C] of record st: CellState; owner: P; orphan: boolean; noted: boolean; end;
  ticket: array [C] of TicketState;               -- of the value that is made, or stands, in this cell
  -- private memory
  pc: array [P] of PC;
  work: array [P] of Work;
  mine: array [P] of C;  mine_moved: array [P] of boolean;    -- the cell in the making
  claim: array [P] of S;  claim_moved: array [P] of boolean;  -- the slot that it claimed
  at: array [P] of S;  at_moved: array [P] of boolean;        -- the slot that was found
  old: array [P] of C;  old_fresh: array [P] of boolean;  old_moved: array [P] of boolean;  -- and its cell
  done: array [P] of boolean;                     -- its exchange succeeded
  seen: array [P] of array [S] of boolean;
  deaths: 0..DEATHS;

procedure put_slot(s: S; st: SlotState);
begin
  slot[s].st := st;
  if st = EMPTY then undefine slot[s].cell; undefine slot[s].fresh; endif;
  for q: P do
    if !isundefined(claim[q]) & claim[q] = s then claim_moved[q] := true; endif;
    if !isundefined(at[q]) & at[q] = s then at_moved[q] := true; endif;
  endfor;
end;

procedure name_slot(s: S; st: SlotState; c: C);
begin put_slot(s, st); slot[s].cell := c; slot[s].fresh := true; end;

procedure put_cell(c: C; st: CellState);
begin
  cell[c].st := st; cell[c].orphan := false;
  for q: P do
    if !isundefined(mine[q]) & mine[q] = c then mine_moved[q] := true; endif;
    if !isundefined(old[q]) & old[q] = c then old_moved[q] := true; endif;
  endfor;
end;

-- A new life: whoever has read the old one knows a life that is over.
procedure new_life(c: C);
begin
  for s: S do if slot[s].st != EMPTY & slot[s].cell = c then slot[s].fresh := false; endif; endfor;
  for q: P do if !isundefined(old[q]) & old[q] = c then old_fresh[q] := false; endif; endfor;
end;

procedure start_search(p: P);
begin for s: S do seen[p][s] := false; endfor; end;

function seen_all(p: P): boolean;
begin return forall s: S do seen[p][s] end; end;

procedure forget_found(p: P);
begin undefine at[p]; undefine at_moved[p]; undefine old[p]; undefine old_fresh[p]; undefine old_moved[p]; end;

procedure found(p: P; s: S);
begin
  undefine seen[p];
  at[p] := s; at_moved[p] := false;
  old[p] := slot[s].cell; old_fresh[p] := slot[s].fresh; old_moved[p] := false;
end;

procedure forget(p: P);
begin
  forget_found(p); undefine work[p]; undefine mine[p]; undefine mine_moved[p]; undefine claim[p]; undefine claim_moved[p];
  undefine done[p]; undefine seen[p];
end;

procedure rest(p: P);
begin forget(p); pc[p] := IDLE; end;

procedure look(p: P);
begin forget_found(p); undefine done[p]; undefine claim[p]; undefine claim_moved[p]; start_search(p); pc[p] := LOOK; end;

ruleset p: P do
  -- make a value
  ruleset c: C; w: Work do
    rule "save: claim a cell" pc[p] = IDLE & cell[c].st = NOTHING & (w = SAVE | w = OVERWRITE) ==>
    begin
      new_life(c); put_cell(c, MAKING); cell[c].owner := p; cell[c].noted := false; ticket[c] := BACK;
      work[p] := w; mine[p] := c; mine_moved[p] := false; pc[p] := ISSUE;
    end;
  end;
  rule "save: issue" pc[p] = ISSUE ==>
  begin ticket[mine[p]] := SENT; if NOTE_FIRST then pc[p] := NOTE; else pc[p] := KEEP; endif; end;
  rule "save: note" pc[p] = NOTE ==>
  begin
    cell[mine[p]].noted := true;
    if NOTE_FIRST then pc[p] := KEEP; else look(p); endif;
  end;
  rule "save: keep" pc[p] = KEEP ==>
  begin
    if ticket[mine[p]] != SENT then pc[p] := FAIL;
    else
      ticket[mine[p]] := KEPT;
      if NOTE_FIRST then look(p); else pc[p] := NOTE; endif;
    endif;
  end;

  -- publish it, or remove what there is
  rule "remove" pc[p] = IDLE ==> begin work[p] := REMOVE; look(p); end;
  ruleset s: S do
    rule "look" pc[p] = LOOK & !seen[p][s] ==>
    begin
      seen[p][s] := true;
      if slot[s].st = NAMED then
        if work[p] = SAVE then undefine seen[p]; pc[p] := FAIL; else found(p, s); pc[p] := MARK; endif;
      elsif seen_all(p) then
        undefine seen[p];
        if work[p] = REMOVE then rest(p); else pc[p] := CLAIM; endif;
      endif;
    end;
    rule "claim a slot" pc[p] = CLAIM & slot[s].st = EMPTY ==>
    begin
      name_slot(s, CLAIMED, mine[p]);
      claim[p] := s; claim_moved[p] := false;
      start_search(p);
      if RIVALS then pc[p] := RIVAL; else pc[p] := AGAIN; endif;
    end;
    rule "look for rivals" pc[p] = RIVAL & !seen[p][s] ==>
    begin
      seen[p][s] := true;
      if slot[s].st = CLAIMED & s != claim[p] then found(p, s); pc[p] := END_RIVAL;
      elsif seen_all(p) then start_search(p); pc[p] := AGAIN; endif;
    end;
    rule "look for the name" pc[p] = AGAIN & !seen[p][s] ==>
    begin
      seen[p][s] := true;
      if LOOK_AGAIN & slot[s].st = NAMED then undefine seen[p]; pc[p] := UNCLAIM;
      elsif seen_all(p) then undefine seen[p]; pc[p] := NAME; endif;
    end;
  end;
  rule "no slot left" pc[p] = CLAIM & forall s: S do slot[s].st != EMPTY end ==> begin pc[p] := FAIL; end;
  rule "end a rival" pc[p] = END_RIVAL ==>
  begin
    if !at_moved[p] then put_slot(at[p], EMPTY); endif;
    forget_found(p); start_search(p); pc[p] := RIVAL;
  end;
  rule "unclaim" pc[p] = UNCLAIM ==>
  begin if !claim_moved[p] then put_slot(claim[p], EMPTY); endif; look(p); end;
  rule "name" pc[p] = NAME ==>
  begin
    if claim_moved[p] then look(p);
    else name_slot(claim[p], NAMED, mine[p]); undefine claim[p]; undefine claim_moved[p]; pc[p] := STAND; endif;
  end;
  rule "stand" pc[p] = STAND ==>
  begin
    if !mine_moved[p] then put_cell(mine[p], STANDING); undefine cell[mine[p]].owner; endif;
    rest(p);
  end;
  rule "could not be saved" pc[p] = FAIL ==>
  begin
    if mine_moved[p] then rest(p);
    else
      put_cell(mine[p], RELEASING);
      old[p] := mine[p]; old_fresh[p] := true; old_moved[p] := false; undefine mine[p]; undefine mine_moved[p]; pc[p] := GIVE_UP;
    endif;
  end;

  -- replace, or take away
  rule "mark" pc[p] = MARK ==>
  begin
    if !MARK_FIRST then pc[p] := EXCHANGE;
    elsif !old_fresh[p] | cell[old[p]].st = NOTHING | cell[old[p]].st = RELEASING then look(p);
    else put_cell(old[p], LEAVING); cell[old[p]].owner := p; old_moved[p] := false; pc[p] := EXCHANGE; endif;
  end;
  rule "exchange" pc[p] = EXCHANGE ==>
  begin
    if !at_moved[p] then
      if work[p] = OVERWRITE then name_slot(at[p], NAMED, mine[p]); else put_slot(at[p], EMPTY); endif;
      done[p] := true; pc[p] := LET_GO;
    elsif slot[at[p]].st = NAMED & slot[at[p]].cell = old[p] & slot[at[p]].fresh & old_fresh[p] then
      at_moved[p] := false;                         -- a sweeper has moved the number alone
      if AGAIN_IN_PLACE then pc[p] := MARK; else look(p); endif;
    else done[p] := false; pc[p] := LET_GO; endif;
  end;
  rule "let go" pc[p] = LET_GO ==>
  begin
    if (SAME_LIFE & !old_fresh[p]) | cell[old[p]].st = NOTHING | cell[old[p]].st = RELEASING then
      if !isundefined(done[p]) & !done[p] then look(p);
      elsif work[p] = OVERWRITE then forget_found(p); pc[p] := STAND;
      else rest(p); endif;
    else put_cell(old[p], RELEASING); cell[old[p]].owner := p; pc[p] := GIVE_UP; endif;
  end;

  -- release a cell that no slot names
  rule "give up" pc[p] = GIVE_UP ==>
  begin if cell[old[p]].noted then ticket[old[p]] := BACK; endif; pc[p] := WIPE; end;
  rule "wipe" pc[p] = WIPE ==> begin cell[old[p]].noted := false; pc[p] := FREE; end;
  rule "free" pc[p] = FREE ==>
  begin
    put_cell(old[p], NOTHING); undefine cell[old[p]].owner;
    if isundefined(done[p]) then rest(p);
    elsif !done[p] then look(p);
    elsif work[p] = OVERWRITE then forget_found(p); pc[p] := STAND;
    else rest(p); endif;
  end;

  -- a dead one's cell
  ruleset c: C do
    rule "sweep: take" pc[p] = IDLE & cell[c].orphan ==>
    begin
      work[p] := SWEEP;
      if cell[c].st = RELEASING then put_cell(c, RELEASING); pc[p] := GIVE_UP;
      else put_cell(c, LEAVING); start_search(p); pc[p] := REFER; endif;
      cell[c].owner := p; old[p] := c; old_fresh[p] := true; old_moved[p] := false;
    end;
  end;
  ruleset s: S do
    rule "sweep: look" pc[p] = REFER & !seen[p][s] ==>
    begin
      seen[p][s] := true;
      if slot[s].st != EMPTY & slot[s].cell = old[p] & slot[s].fresh & old_fresh[p] then
        undefine seen[p]; at[p] := s; at_moved[p] := false; pc[p] := SWEPT;
      elsif seen_all(p) then undefine seen[p]; pc[p] := LET_GO; endif;
    end;
  end;
  rule "sweep: move" pc[p] = SWEPT ==>
  begin
    if slot[at[p]].st = NAMED & !at_moved[p] then
      if MOVE then put_slot(at[p], NAMED); endif;
      pc[p] := KEPT_NAME;
    else
      if !at_moved[p] then put_slot(at[p], EMPTY); endif;
      undefine at[p]; undefine at_moved[p]; start_search(p); pc[p] := REFER;
    endif;
  end;
  rule "sweep: stand" pc[p] = KEPT_NAME ==>
  begin
    if !old_moved[p] then put_cell(old[p], STANDING); undefine cell[old[p]].owner; endif;
    rest(p);
  end;

  rule "killed" pc[p] != IDLE & (DEATHS = 0 | deaths < DEATHS) ==>
  begin
    if DEATHS != 0 then deaths := deaths + 1; endif;
    for c: C do
      if !isundefined(cell[c].owner) & cell[c].owner = p then cell[c].orphan := true; undefine cell[c].owner; endif;
    endfor;
    rest(p);
  end;
end;

ruleset c: C do
  -- A full pool, or a reaper: while it is nobody's name, a ticket may be taken back at any time.
  rule "ticket taken back" ticket[c] = SENT ==> begin ticket[c] := BACK; end;
end;

startstate begin
  undefine slot; undefine cell; deaths := 0;
  for s: S do slot[s].st := EMPTY; endfor;
  for c: C do cell[c].st := NOTHING; cell[c].orphan := false; cell[c].noted := false; ticket[c] := BACK; endfor;
  for p: P do forget(p); pc[p] := IDLE; endfor;
end;

invariant "a name is in one slot"
  forall s: S do forall t: S do (slot[s].st = NAMED & slot[t].st = NAMED) -> s = t end end;
invariant "what is named is all there"
  forall s: S do slot[s].st = NAMED ->
    (slot[s].fresh & ticket[slot[s].cell] = KEPT & cell[slot[s].cell].noted &
     (cell[slot[s].cell].st = MAKING | cell[slot[s].cell].st = STANDING | cell[slot[s].cell].st = LEAVING)) end;
invariant "what stands is named"
  forall c: C do cell[c].st = STANDING ->
    exists s: S do slot[s].st = NAMED & slot[s].cell = c & slot[s].fresh end end;
invariant "what is free keeps nothing alive"
  forall c: C do cell[c].st = NOTHING -> ticket[c] != KEPT end;
-- Nobody at work: a cell that is neither free nor standing is a dead one's, so that a sweep finds it.
invariant "no work is nobody's"
  (forall p: P do pc[p] = IDLE end) ->
    (forall c: C do cell[c].st = NOTHING | cell[c].st = STANDING | cell[c].orphan end);
liveness "all comes to rest"
  (forall c: C do cell[c].st = NOTHING | cell[c].st = STANDING end) & (forall s: S do slot[s].st != CLAIMED end) &
  (forall p: P do pc[p] = IDLE end);
