# The README's two lines in a container.
#
# Run the mini study and take its report out:
#     docker build -t newsrepro . && docker run --name study newsrepro
#     docker cp study:/newsrepro/reports/mini mini-report
# Pass the tests:
#     docker build --target test -t newsrepro-test . && docker run --rm newsrepro-test
# What follows the image's name replaces the default command: `docker run --rm newsrepro list`.

FROM python:3.11-slim AS clone
# Results are stamped with the clone's commit. Reading it needs git, and .git, which is copied for that (see .dockerignore).
RUN apt-get update \
    && apt-get install -y --no-install-recommends git \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home reader \
    && install -d -o reader -g reader /newsrepro
# Everything below is done by, and belongs to, a user without privileges.
USER reader
WORKDIR /newsrepro
COPY --chown=reader:reader . .

FROM clone AS test
RUN python3 -m venv .venv && .venv/bin/pip install --no-cache-dir -e '.[dev]'
CMD [".venv/bin/pytest"]

# The last stage is what a build without --target makes.
FROM clone AS study
RUN python3 -m venv .venv && .venv/bin/pip install --no-cache-dir -e .
ENTRYPOINT [".venv/bin/newsrepro"]
CMD ["reproduce"]
