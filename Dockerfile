# The image has one file, the static binary: docker build -t app . (or podman build)
FROM docker.io/library/rust:1-bookworm AS build
# Adds the list of crates to the binary, which scanners of images read.
RUN cargo install --locked cargo-auditable
COPY . /src
RUN --mount=type=cache,target=/src/target make -C /src static && cp /src/target/static/app /app

FROM scratch
COPY --from=build /app /app
USER 65534
ENV APP_LISTEN=0.0.0.0:8080,admin=0.0.0.0:9090
ENTRYPOINT ["/app"]
