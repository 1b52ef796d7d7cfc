package forebay;

import java.io.IOException;
import java.io.InputStream;
import java.io.OutputStream;
import java.net.InetSocketAddress;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.StandardCopyOption;
import java.util.Properties;
import java.util.Set;
import java.util.stream.Collectors;
import org.apache.hadoop.conf.Configuration;
import org.apache.hadoop.hdfs.MiniDFSCluster;
import org.apache.hadoop.hdfs.server.datanode.DataNode;
import org.apache.hadoop.security.UserGroupInformation;

/**
 * A real HDFS in one process: a NameNode and some DataNodes on 127.0.0.1, for tests. Started by hdfs.sh run.
 *
 * <p>Arguments are key=value; hdfs.sh names them. The ports are noted in the folder, so that a start on the same folder has the
 * same ones, and clients find everything again where it was.
 *
 * <p>It is made to be killed. The edit log is written before a call is answered but not forced to disk, and blocks are files: both
 * outlive the process, not the machine.
 */
public final class HdfsServer {
  private static final Set<String> KEYS = Set.of("dir", "format", "n", "perms", "nn", "http", "dn", "dnhttp", "dnipc");
  /** What the ports of one DataNode are apart from those of the next, where the caller chose them. */
  private static final int STRIDE = 10;

  private final Properties given = new Properties();
  private final Properties noted = new Properties();
  private final Configuration conf = new Configuration();
  private final Path dir;
  private final boolean format;

  private HdfsServer(String[] arguments) throws IOException {
    for (String argument : arguments) {
      String[] pair = argument.split("=", 2);
      boolean hadoop = pair[0].contains(".");
      if (pair.length < 2 || !hadoop && !KEYS.contains(pair[0])) {
        throw new IllegalArgumentException(argument + ": not one of " + KEYS + "=VALUE, nor a KEY.OF.HADOOP=VALUE");
      }
      given.setProperty(pair[0], pair[1]);
    }
    if (!given.containsKey("dir")) {
      throw new IllegalArgumentException("dir=FOLDER is missing");
    }
    dir = Files.createDirectories(Path.of(given.getProperty("dir"))).toRealPath();
    format = Boolean.parseBoolean(given.getProperty("format", "true"));
    if (!format && Files.exists(notes())) {
      try (InputStream in = Files.newInputStream(notes())) {
        noted.load(in);
      }
    }
  }

  private Path notes() {
    return dir.resolve("ports.properties");
  }

  /** The port that was asked for, else the one this folder had before, else 0: any free one. */
  private int port(String key, int i) {
    int first = Integer.parseInt(given.getProperty(key, "0"));
    return first != 0 ? first + STRIDE * i : Integer.parseInt(noted.getProperty(key + i, "0"));
  }

  private void configure(int dataNodes) throws IOException {
    conf.set("hadoop.tmp.dir", dir.resolve("tmp").toString());
    conf.setBoolean("dfs.permissions.enabled", Boolean.parseBoolean(given.getProperty("perms", "true")));
    conf.setInt("dfs.replication", Math.min(dataNodes, 3));
    conf.setInt("dfs.namenode.fs-limits.min-block-size", 4096);
    // A DataNode is told with its heartbeat which blocks to delete or to copy.
    conf.setInt("dfs.heartbeat.interval", 1);
    // The user who starts this is superuser, and may act for anybody.
    String user = UserGroupInformation.getCurrentUser().getShortUserName();
    conf.set("hadoop.proxyuser." + user + ".hosts", "*");
    conf.set("hadoop.proxyuser." + user + ".groups", "*");
    given.stringPropertyNames().stream().filter(k -> k.contains(".")).forEach(k -> conf.set(k, given.getProperty(k)));
  }

  private MiniDFSCluster start() throws IOException {
    int dataNodes = Integer.parseInt(given.getProperty("n", "1"));
    configure(dataNodes);
    Configuration[] overlays = new Configuration[dataNodes];
    for (int i = 0; i < dataNodes; i++) {
      overlays[i] = new Configuration(false);
      overlays[i].set("dfs.datanode.address", "127.0.0.1:" + port("dn", i));
      overlays[i].set("dfs.datanode.http.address", "127.0.0.1:" + port("dnhttp", i));
      overlays[i].set("dfs.datanode.ipc.address", "127.0.0.1:" + port("dnipc", i));
    }
    // One name folder of the two suffices. build() returns when safe mode is left, which takes a report of nearly all blocks.
    MiniDFSCluster cluster = new MiniDFSCluster.Builder(conf, dir.toFile())
        .nameNodePort(port("nn", 0)).nameNodeHttpPort(port("http", 0))
        .numDataNodes(dataNodes).storagesPerDatanode(1).dataNodeConfOverlays(overlays).checkDataNodeAddrConfig(true)
        .enableManagedDfsDirsRedundancy(false).skipFsyncForTesting(true)
        .format(format).waitSafeMode(true).build();
    cluster.waitActive();
    note(cluster);
    return cluster;
  }

  /** Whole or not at all: the process may be killed at any time. */
  private void note(MiniDFSCluster cluster) throws IOException {
    Properties ports = new Properties();
    InetSocketAddress http = cluster.getNameNode().getHttpAddress();
    ports.setProperty("nn0", "" + cluster.getNameNodePort());
    ports.setProperty("http0", "" + http.getPort());
    for (int i = 0; i < cluster.getDataNodes().size(); i++) {
      DataNode node = cluster.getDataNodes().get(i);
      ports.setProperty("dn" + i, "" + node.getXferPort());
      ports.setProperty("dnhttp" + i, "" + node.getInfoPort());
      ports.setProperty("dnipc" + i, "" + node.getIpcPort());
    }
    Path fresh = notes().resolveSibling("ports.new");
    try (OutputStream out = Files.newOutputStream(fresh)) {
      ports.store(out, null);
    }
    Files.move(fresh, notes(), StandardCopyOption.ATOMIC_MOVE);
  }

  public static void main(String[] arguments) {
    try {
      HdfsServer server = new HdfsServer(arguments);
      // Jetty unpacks its pages there; in /tmp they would outlive a kill.
      System.setProperty("java.io.tmpdir", Files.createDirectories(server.dir.resolve("tmp")).toString());
      MiniDFSCluster cluster = server.start();
      String dataNodes = cluster.getDataNodes().stream().map(d -> "127.0.0.1:" + d.getXferPort()).collect(Collectors.joining(","));
      System.out.println("READY hdfs://127.0.0.1:" + cluster.getNameNodePort()
          + " http=127.0.0.1:" + cluster.getNameNode().getHttpAddress().getPort() + " dn=" + dataNodes);
      System.out.flush();
    } catch (Throwable e) {
      e.printStackTrace();
      // Hadoop leaves threads behind that would keep the process.
      Runtime.getRuntime().halt(1);
    }
  }
}
