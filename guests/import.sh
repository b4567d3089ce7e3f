# Turns a finished guest into target/guest/NAME.oci, by vmpod's own commands. Sourced after lib.sh.
# shellcheck shell=bash

# publish NAME [import arguments…]: imports into a store of the build's own and exports the image from there.
publish() {
    local name=$1
    shift
    [ -x "$vmpod" ] || die "$vmpod isn't built; run \`make build\` first"
    local home=$work/home
    "$vmpod" --home "$home" image import "$@"
    "$vmpod" --home "$home" image export "$name" "$work/$guest.oci"
    rm -rf "$out/$guest.oci"
    mv "$work/$guest.oci" "$out/$guest.oci"
}
