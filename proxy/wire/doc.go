// Package wire turns bytes into requests and responses into bytes, and puts our addresses into the upstream's replies.
//
// A frame here is what follows the four bytes of its size, unless a function says otherwise. Nothing is read from or
// written to a socket, no function keeps a frame after it returned, and none changes the bytes it was given.
//
// What it promises:
//
//   - Requests are read as Kafka's own broker reads them ([DecodeRequest]): what Kafka answers by closing the connection
//     (a null where the schema has none, an array longer than the frame) is an error. A claimed length never allocates
//     more than the bytes that are really there call for.
//   - Rewriting ([RewriteResponse]) copies everything that it need not change byte for byte: what comes after the last
//     address is not even read, so new error codes, topics and tags pass through. A real address never survives: an
//     unknown node id, an unknown version or a truncated reply is an error, and then the reply must not be sent.
//   - Of keys and versions that it does not know, it reads the header as far as that is certain ([ParseRequestHeader]).
//
// What it does not do: records are never decoded, and Fetch replies are never read. They name brokers' addresses from
// version 16 on only, which is why we let clients use 15 at most.
package wire
