#!/bin/sh
# Builds the package from ARCHIVE and installs it into PREFIX, a virtual environment that sees Debian's packages.
# Nothing is downloaded. The stamp (DIGEST) is written last: what is half done is done again.
# Environment: ARCHIVE, DIGEST, SOURCE, PREFIX.
set -eu
rm -rf "$SOURCE"
mkdir -p "$SOURCE"
tar -xzf "$ARCHIVE" -C "$SOURCE" --no-same-owner
rm -f "$ARCHIVE"
rm -f "$PREFIX/source.sha256"
[ -x "$PREFIX/bin/python3" ] || python3 -m venv --system-site-packages --without-pip "$PREFIX"
python3 -m pip --quiet --disable-pip-version-check --python "$PREFIX/bin/python3" install \
  --force-reinstall --no-deps --no-build-isolation --no-index "$SOURCE"
rm -rf "$SOURCE/build"
ln -sf "$PREFIX/bin/xen9p" /usr/local/bin/xen9p
ln -sf "$PREFIX/bin/xen9pd" /usr/local/sbin/xen9pd
echo "$DIGEST" > "$PREFIX/source.sha256"
