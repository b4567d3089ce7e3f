#!/usr/bin/env python3
"""Makes the samples of foreign image formats beside this file, as OCI image layouts.

It is an encoder of its own, written from the formats' descriptions and sharing nothing with the reader under test.
Run it in an empty directory to make them again; they come out the same, byte for byte:

    python3 make.py DIRECTORY
"""

import gzip
import hashlib
import io
import json
import os
import struct
import subprocess
import sys
import tarfile

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"


def sha(data):
    return "sha256:" + hashlib.sha256(data).hexdigest()


def noise(seed, size):
    out = bytearray()
    counter = 0
    while len(out) < size:
        out += hashlib.sha256(f"{seed}/{counter}".encode()).digest()
        counter += 1
    return bytes(out[:size])


def disk(size):
    """Mostly zeros, some text with matches near and far, a little noise."""
    data = bytearray(size)
    text = b"".join(b"line %d of a file that repeats itself\n" % (n % 97) for n in range(4000))
    data[512:512 + len(text)] = text
    data[300_000:303_000] = noise("a", 3000)
    # The same noise again within and beyond 64 KiB: matches across blocks, and none where the window ends.
    data[350_000:353_000] = noise("a", 3000)
    data[900_000:903_000] = noise("a", 3000)
    data[size - 700:size - 100] = noise("b", 600)
    return bytes(data)


def lz4_block(data, start, end):
    """One greedy LZ4 block of data[start:end]; matches may reach into what went before, up to 65535 bytes."""
    table = {}
    for at in range(max(0, start - 65535), start):
        table[data[at:at + 4]] = at
    out = bytearray()
    anchor = at = start

    def sequence(literals, offset, length):
        token_literals = min(len(literals), 15)
        token_match = 0 if offset is None else min(length - 4, 15)
        out.append(token_literals << 4 | token_match)
        if token_literals == 15:
            rest = len(literals) - 15
            while rest >= 255:
                out.append(255)
                rest -= 255
            out.append(rest)
        out.extend(literals)
        if offset is None:
            return
        out.extend(struct.pack("<H", offset))
        if token_match == 15:
            rest = length - 4 - 15
            while rest >= 255:
                out.append(255)
                rest -= 255
            out.append(rest)

    # The format's own rule: the last five bytes are literals, the last match begins twelve before the end.
    while at < end - 12:
        key = data[at:at + 4]
        before = table.get(key)
        table[key] = at
        if before is None or at - before > 65535:
            at += 1
            continue
        length = 4
        while at + length < end - 5 and data[before + length] == data[at + length]:
            length += 1
        sequence(data[anchor:at], at - before, length)
        for inside in range(at + 1, min(at + length, end - 4), 17):
            table[data[inside:inside + 4]] = inside
        at += length
        anchor = at
    sequence(data[anchor:end], None, 0)
    return bytes(out)


def apple_lz4(data, block=65536):
    out = bytearray()
    for start in range(0, len(data), block):
        end = min(start + block, len(data))
        packed = lz4_block(data, start, end)
        if len(packed) < end - start:
            out += b"bv41" + struct.pack("<II", end - start, len(packed)) + packed
        else:
            out += b"bv4-" + struct.pack("<I", end - start) + data[start:end]
    return bytes(out + b"bv4$")


def gz(data):
    return gzip.compress(data, mtime=0)


class Layout:
    def __init__(self, root, name):
        self.dir = os.path.join(root, name + ".oci")
        os.makedirs(os.path.join(self.dir, "blobs", "sha256"))
        with open(os.path.join(self.dir, "oci-layout"), "w") as file:
            file.write('{"imageLayoutVersion":"1.0.0"}')
        self.layers = []

    def blob(self, media_type, data, **annotations):
        with open(os.path.join(self.dir, "blobs", "sha256", sha(data)[7:]), "wb") as file:
            file.write(data)
        descriptor = {"mediaType": media_type, "digest": sha(data), "size": len(data)}
        if annotations:
            descriptor["annotations"] = annotations
        return descriptor

    def layer(self, media_type, data, annotations=None):
        self.layers.append(self.blob(media_type, data, **(annotations or {})))

    def finish(self, config_type, config, artifact=None, annotations=None):
        manifest = {"schemaVersion": 2, "mediaType": OCI_MANIFEST}
        if artifact:
            manifest["artifactType"] = artifact
        manifest["config"] = self.blob(config_type, json.dumps(config).encode())
        manifest["layers"] = self.layers
        if annotations:
            manifest["annotations"] = annotations
        descriptor = self.blob(OCI_MANIFEST, json.dumps(manifest).encode())
        with open(os.path.join(self.dir, "index.json"), "w") as file:
            json.dump({"schemaVersion": 2, "manifests": [descriptor]}, file)


def tart(root, name, data, v1=False, stacked=False, linux=False):
    layout = Layout(root, name)
    config = {"version": 1, "os": "darwin", "arch": "arm64", "ecid": "ZWNpZA==", "hardwareModel": "bW9kZWw=",
              "cpuCountMin": 2, "cpuCount": 4, "memorySizeMin": 2 << 30, "memorySize": 4 << 30,
              "macAddress": "02:00:00:00:00:01", "display": {"width": 1024, "height": 768}}
    if linux:
        for key in ("ecid", "hardwareModel"):
            del config[key]
        config["os"] = "linux"
    prefix = "application/vnd.cirruslabs.tart."
    key = "org.cirruslabs.tart."
    layout.layer(prefix + "config.v1", json.dumps(config).encode())
    if v1:
        packed = apple_lz4(data)
        for at in range(0, len(packed), 5000):
            layout.layer(prefix + "disk.v1", packed[at:at + 5000])
    else:
        for at in range(0, len(data), 700_000):
            part = data[at:at + 700_000]
            layout.layer(prefix + "disk.v2", apple_lz4(part), {
                key + "uncompressed-size": str(len(part)), key + "uncompressed-content-digest": sha(part)})
    if stacked:
        layout.layer(prefix + "disk.asif.overlay.v1", b"overlay")
    layout.layer(prefix + "nvram.v1", noise("nvram", 2000))
    labels = {"config": {"Labels": {key + "disk.format": "raw"}}, "architecture": "arm64", "os": config["os"]}
    layout.finish(OCI_CONFIG, labels, annotations={
        key + "uncompressed-disk-size": str(len(data)), key + "upload-time": "2026-01-01T00:00:00Z"})


def agoda(root, name, data, packed):
    layout = Layout(root, name)
    prefix = "application/vnd.agoda.macosvz."

    def add(kind, raw, title):
        annotations = {"org.opencontainers.image.title": title}
        if packed:
            annotations["com.agoda.macosvz.content.uncompressed-size"] = str(len(raw))
            annotations["com.agoda.macosvz.content.uncompressed-digest"] = sha(raw)
        layout.layer(prefix + kind, gz(raw) if packed else raw, annotations)

    config = {"mediatype": prefix + "config.v1+json", "os": "darwin", "hardwareModelData": "bW9kZWw=",
              "machineIdData": "bWFjaGluZQ==", "storage": [{"mediatype": prefix + "disk.image.v1", "file": "disk.img"}]}
    layout.layer(prefix + "config.v1+json", json.dumps(config).encode(),
                 {"org.opencontainers.image.title": "../../config.json"})
    add("aux.image.v1", noise("aux", 1500), "aux.img")
    add("disk.image.v1", data, "/etc/passwd")
    layout.finish("application/vnd.oci.empty.v1+json", {}, artifact=prefix + "artifact")


def lume(root, name, data, whole=False):
    layout = Layout(root, name)
    prefix = "application/vnd.trycua.lume."
    key = "org.trycua.lume."
    layout.layer(prefix + "nvram.v1", noise("nvram", 1800))
    if whole:
        layout.layer(prefix + "disk.v1", gz(data), {"org.opencontainers.image.title": "disk.img"})
    else:
        step = 500_000
        parts = [(at, data[at:at + step]) for at in range(0, len(data), step)]
        # Out of order, and equal parts (zeros) share a digest.
        for number, (at, part) in sorted(enumerate(parts), key=lambda item: -item[0]):
            layout.layer(prefix + "disk.v1", gz(part), {
                key + "part.number": str(number), key + "part.total": str(len(parts)), key + "part.offset": str(at),
                key + "chunk.size": str(step), key + "content.uncompressed-size": str(len(part)),
                key + "content.uncompressed-digest": sha(part)})
    config = {"mediatype": prefix + "config.v1+json", "os": "macOS", "hardwareModel": "bW9kZWw=",
              "machineIdentifier": "bWFjaGluZQ==", "storage": []}
    layout.finish(prefix + "config.v1+json", config, annotations={
        key + "os": "macOS", key + "cpu-count": "4", key + "disk-size": str(len(data)),
        key + "total-uncompressed-size": str(len(data))})


def lume_legacy(root, name, data):
    layout = Layout(root, name)
    step = 800_000
    for at in range(0, len(data), step):
        layout.layer("application/octet-stream+lz4", apple_lz4(data[at:at + step]))
    layout.layer("application/octet-stream", noise("nvram", 1700))
    config = {"os": "macOS", "cpuCount": 4, "memorySize": 4 << 30, "diskSize": len(data), "hardwareModel": "bW9kZWw=",
              "machineIdentifier": "bWFjaGluZQ==", "macAddress": "02:00:00:00:00:02"}
    layout.layer(OCI_CONFIG, json.dumps(config).encode())
    layout.finish("application/vnd.oci.empty.v1+json", {})


def tar_layer(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path, data in files:
            info = tarfile.TarInfo(path)
            info.uid = info.gid = 107
            info.mode = 0o440
            if data is None:
                info.type = tarfile.DIRTYPE
                info.mode = 0o555
                archive.addfile(info)
            else:
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def container_disk(root, name, layers, labels=None):
    layout = Layout(root, name)
    diffs = []
    for number, files in enumerate(layers):
        archive = tar_layer(files)
        diffs.append(sha(archive))
        if number == 0 and len(layers) > 1:
            layout.layer("application/vnd.oci.image.layer.v1.tar", archive)
        else:
            layout.layer("application/vnd.oci.image.layer.v1.tar+gzip", gz(archive))
    config = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": diffs}}
    if labels:
        config["config"] = {"Labels": labels}
    layout.finish(OCI_CONFIG, config)


def qcow2(root, data, *options):
    raw, out = os.path.join(root, "d.raw"), os.path.join(root, "d.qcow2")
    with open(raw, "wb") as file:
        file.write(data)
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", *options, raw, out], check=True)
    with open(out, "rb") as file:
        packed = file.read()
    os.remove(raw)
    os.remove(out)
    return packed


def main(root):
    data = disk(2_000_896)
    odd = data[:1_500_000]
    tart(root, "tart", data)
    tart(root, "tart-linux", data, linux=True)
    tart(root, "tart-v1", odd, v1=True)
    tart(root, "tart-stacked", data, stacked=True)
    agoda(root, "agoda", data, True)
    agoda(root, "agoda-raw", data[:65_536], False)
    lume(root, "lume", data)
    lume(root, "lume-whole", data, whole=True)
    lume_legacy(root, "lume-legacy", data)
    etc = ("etc/passwd", b"qemu:x:107:107::/:\n")
    container_disk(root, "containerdisk-raw", [[("disk", None), ("disk/disk.img", data)]])
    container_disk(root, "containerdisk-qcow2", [
        [etc, ("disk", None), ("disk/old.img", b"old")],
        [("disk/.wh.old.img", b""), ("./disk/" + "n" * 150 + ".qcow2", qcow2(root, data, "-c"))],
    ], {"dev.vmpod.firmware": "uefi", "dev.vmpod.guest.user": "debian"})
    container_disk(root, "containerdisk-two", [[("disk/a.img", data[:4096]), ("disk/b.img", data[:4096])]])
    container_disk(root, "container", [[etc]])
    with open(os.path.join(root, "expected.json"), "w") as file:
        json.dump({"disk": sha(data)[7:], "odd": sha(odd + bytes(-len(odd) % 512))[7:], "head": sha(data[:65_536])[7:]},
                  file, indent=1)


if __name__ == "__main__":
    main(sys.argv[1])
