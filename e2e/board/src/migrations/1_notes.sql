-- autoincrement, so that the id of a note that was removed is never used again: clients ask for the notes after an id.
create table notes (
    id integer primary key autoincrement,
    author text not null,
    text text not null
) strict;
