package forebay;

import java.io.IOException;
import java.net.URI;
import org.apache.hadoop.conf.Configuration;
import org.apache.hadoop.fs.FileSystem;
import org.apache.hadoop.fs.contract.hdfs.HDFSContract;
import org.apache.hadoop.hdfs.HdfsConfiguration;

/**
 * What Hadoop says HDFS does (its contract/hdfs.xml, which the constructor of HDFSContract loads), of a server that runs
 * somewhere: at the URI of the system property contract.uri.
 */
public final class RemoteHdfsContract extends HDFSContract {
  public RemoteHdfsContract(Configuration conf) {
    super(conf);
  }

  /** As in HDFSContract, one client for all, with the options of its MiniDFSCluster: blocks of 1 KiB among them. */
  @Override
  public FileSystem getTestFileSystem() throws IOException {
    Configuration conf = new HdfsConfiguration();
    conf.addResource(CONTRACT_HDFS_XML);
    conf.setInt("dfs.blocksize", Integer.getInteger("contract.blocksize", BLOCK_SIZE));
    conf.setInt("dfs.replication", 1);
    return FileSystem.get(URI.create(System.getProperty("contract.uri")), conf);
  }
}
