'use strict';
// An independent SPDY/3.1 client of the kubelet API, with flow control: it opens a session's streams, sends its
// standard input as the command's, and prints what came back as JSON.
//
//   node spdy.js HOST PORT DIR METHOD PATH STREAM...
//
// DIR holds ca.pem, cert.pem, key.pem. PATH is the request's. A port-forward names its streams `data` and `error`.

const crypto = require('crypto');
const fs = require('fs');
const path = require('path');
const tls = require('tls');
const transport = require('spdy-transport');

const [host, port, dir, method, target, ...names] = process.argv.slice(2);
const read = (name) => fs.readFileSync(path.join(dir, name));
const input = fs.readFileSync(0);
const forwarding = names.includes('data');
const protocol = forwarding ? 'portforward.k8s.io' : 'v4.channel.k8s.io';

const fail = (message) => {
  console.error(message);
  process.exit(1);
};

const socket = tls.connect({
  host,
  port: Number(port),
  ca: read('ca.pem'),
  cert: read('cert.pem'),
  key: read('key.pem'),
  ALPNProtocols: ['http/1.1'],
});
socket.on('error', (error) => fail(`the connection failed: ${error}`));
socket.on('secureConnect', () => {
  socket.write(
    `${method} ${target} HTTP/1.1\r\nHost: ${host}\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n` +
      `X-Stream-Protocol-Version: ${protocol}\r\nContent-Length: 0\r\n\r\n`,
  );
});

let head = Buffer.alloc(0);
socket.on('readable', function upgrade() {
  let chunk;
  while ((chunk = socket.read()) !== null) {
    head = Buffer.concat([head, chunk]);
    const end = head.indexOf('\r\n\r\n');
    if (end >= 0) {
      socket.removeListener('readable', upgrade);
      const text = head.subarray(0, end).toString();
      if (!text.startsWith('HTTP/1.1 101') || !text.toLowerCase().includes(`x-stream-protocol-version: ${protocol}`)) {
        fail(`not upgraded: ${head}`);
      }
      socket.unshift(head.subarray(end + 4));
      speak();
      return;
    }
  }
});

function speak() {
  const connection = transport.connection.create(socket, { protocol: 'spdy', isServer: false });
  connection.on('error', (error) => fail(`the session failed: ${error}`));
  connection.start(3.1);
  const seen = {};
  let open = names.length;
  for (const name of names) {
    const headers = { streamtype: name };
    if (forwarding) {
      headers.port = process.env.FORWARD_PORT;
      headers.requestid = '0';
    }
    connection.request({ method: 'POST', host, path: '/', headers }, (error, stream) => {
      if (error) fail(`stream ${name} was refused: ${error}`);
      const hash = crypto.createHash('sha256');
      let text = Buffer.alloc(0);
      let bytes = 0;
      stream.on('data', (chunk) => {
        hash.update(chunk);
        bytes += chunk.length;
        if (text.length < 1000) text = Buffer.concat([text, chunk.subarray(0, 1000)]);
      });
      stream.on('error', (broken) => fail(`stream ${name} broke: ${broken}`));
      stream.once('end', () => {
        seen[name] = { bytes, sha256: hash.digest('hex'), text: text.toString('latin1') };
        open -= 1;
        if (open === 0) {
          console.log(JSON.stringify(seen));
          process.exit(0);
        }
      });
      if (name === 'stdin' || name === 'data') stream.write(input, () => stream.end());
      else if (!forwarding) stream.resume();
    });
  }
}
