create table links (
    code text primary key,
    url text not null,
    clicks bigint not null default 0
);

-- The clicks that were added already: whoever does not know whether they were adds them again, to no effect.
create table flushes (
    id bigint primary key,
    at timestamptz not null default now()
);
