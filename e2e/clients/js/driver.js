// kafkajs behind the drivers' line protocol (see e2e/doc.go). Its folder is given, for it is installed elsewhere.
const { Kafka, logLevel } = require(process.env.E2E_JS + '/node_modules/kafkajs');

const [, , verb, bootstrap, topic, ...rest] = process.argv;
const say = (line) => process.stdout.write(line + '\n');
const logCreator = () => ({ namespace, log }) => process.stderr.write(`${namespace} ${log.message} ${log.error || ''}\n`);
const kafka = new Kafka({ brokers: bootstrap.split(','), logLevel: logLevel.WARN, logCreator, retry: { initialRetryTime: 100, maxRetryTime: 1000, retries: 60 } });

async function produce(from, to) {
  const producer = kafka.producer();
  await producer.connect();
  const messages = [];
  for (let i = Number(from); i < Number(to); i++) messages.push({ key: 'k' + i, value: 'v' + i });
  await producer.send({ topic, messages });
  await producer.disconnect();
  say('produced ' + messages.length);
}

async function consume(groupId) {
  // kafkajs sends no heartbeats while its fetches fail: its session must outlast a broker's restart.
  const consumer = kafka.consumer({ groupId, sessionTimeout: 15000, heartbeatInterval: 500, rebalanceTimeout: 15000, metadataMaxAge: 5000, maxWaitTimeInMs: 500 });
  consumer.on(consumer.events.GROUP_JOIN, ({ payload }) => say(('assigned ' + (payload.memberAssignment[topic] || []).sort().join(',')).trim()));
  await consumer.connect();
  await consumer.subscribe({ topic, fromBeginning: true });
  await consumer.run({
    autoCommit: false,
    eachBatch: async ({ batch, resolveOffset }) => {
      for (const m of batch.messages) {
        say(`got ${batch.partition} ${m.offset} ${m.key}`);
        resolveOffset(m.offset);
      }
      await consumer.commitOffsets([{ topic, partition: batch.partition, offset: String(BigInt(batch.lastOffset()) + 1n) }]);
      say('committed');
    },
  });
  process.stdin.once('data', async () => {
    await consumer.disconnect();
    say('left');
    process.exit(0);
  });
}

({ produce, consume })[verb](...rest).catch((e) => {
  process.stderr.write(e.stack + '\n');
  process.exit(1);
});
